"""Read the fields of TRL's settings class from its source; importing it takes seconds."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# `SFTConfig`, after its base classes: package, file, class.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)

# Names of transformers 5.13, for an installation in which they are not found.
_SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"),
    *("constant_with_warmup", "reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay"),
)


@cache
def sft_config_fields() -> dict[str, frozenset[str]]:
    """Return the settable fields of TRL's `SFTConfig` and its base classes.

    Returns:
        By name the types of the annotation, as written: {"int", "None"}. Empty if the classes are
        not found in the installed release; fields are then checked after the import.
    """
    fields: dict[str, frozenset[str]] = {}
    base: list[str] = []
    for package, file, name in _CLASSES:
        found = _find_class(package, file, name)
        # Other base classes may have further fields, which would be rejected as unknown.
        if found is None or (base and list(map(ast.unparse, found.bases)) != base):
            return {}
        base = [name]
        for statement in found.body:
            if isinstance(statement, ast.AnnAssign):
                field = ast.unparse(statement.target)
                fields.pop(field, None)  # a class may redeclare a field as not settable
                if _is_settable(statement):
                    fields[field] = _alternatives(statement.annotation)
    return fields


@cache
def scheduler_names() -> tuple[str, ...]:
    """Return the names that transformers' `get_scheduler` has in the installed release."""
    folder = package_folder("transformers")
    try:
        text = "" if folder is None else (folder / "trainer_utils.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    found = re.search(r"^class SchedulerType\(.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    names = re.findall(r'^    [A-Z_]+ = "(\w+)"', found[0], re.MULTILINE) if found else ()
    return tuple(names) or _SCHEDULERS


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package without importing it."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    locations = list((spec and spec.submodule_search_locations) or ())
    return Path(locations[0]) if locations else None


def _find_class(package: str, file: str, name: str) -> ast.ClassDef | None:
    folder = package_folder(package)
    if folder is None:
        return None
    try:
        module = ast.parse((folder / file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
    classes = (node for node in module.body if isinstance(node, ast.ClassDef))
    return next((node for node in classes if node.name == name), None)


def _is_settable(statement: ast.AnnAssign) -> bool:
    """Return whether a field is an argument of the class's constructor."""
    if ast.unparse(statement.annotation).startswith("ClassVar"):
        return False
    words = statement.value.keywords if isinstance(statement.value, ast.Call) else []
    return "init=False" not in map(ast.unparse, words)


def _alternatives(annotation: ast.expr) -> frozenset[str]:
    """Return the types in `int | None` or `Optional[int]`, as written."""
    if isinstance(annotation, ast.BinOp):
        return _alternatives(annotation.left) | _alternatives(annotation.right)
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.value, ast.Name):
        if annotation.value.id == "Optional":
            return _alternatives(annotation.slice) | {"None"}
        if annotation.value.id == "Union" and isinstance(annotation.slice, ast.Tuple):
            return frozenset().union(*map(_alternatives, annotation.slice.elts))
    return frozenset({ast.unparse(annotation)})
