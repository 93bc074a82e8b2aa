"""Read the fields of TRL's settings class from its source; importing it takes seconds."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Files of classes that a package exports lazily, so that no import statement leads to them.
_HOMES = {("transformers", "TrainingArguments"): "training_args.py"}


@cache
def sft_config_fields() -> dict[str, frozenset[str]]:
    """Return the settable fields of TRL's `SFTConfig` and its base classes.

    Returns:
        By name the types of the annotation, as written: {"int", "None"}. Empty if the classes are
        not found in the installed release; fields are then checked after the import.
    """
    folder = package_folder("trl")
    if folder is None:
        return {}
    try:
        return _fields_of("SFTConfig", folder / "trainer" / "sft_config.py")
    except (_NotFoundError, OSError, SyntaxError, ValueError):
        return {}


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package without importing it."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    locations = list((spec and spec.submodule_search_locations) or ())
    return Path(locations[0]) if locations else None


class _NotFoundError(Exception):
    """A class is not in the expected file."""


def _fields_of(name: str, file: Path) -> dict[str, frozenset[str]]:
    module = ast.parse(file.read_text(encoding="utf-8"))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        raise _NotFoundError(name)
    fields: dict[str, frozenset[str]] = {}
    for base in reversed(classes[name].bases):
        if not isinstance(base, ast.Name):
            raise _NotFoundError(ast.unparse(base))
        place = file if base.id in classes else _home(base.id, module, file)
        fields |= _fields_of(base.id, place)
    for statement in classes[name].body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if not _is_settable(statement):
                fields.pop(statement.target.id, None)
                continue
            fields[statement.target.id] = _alternatives(statement.annotation)
    return fields


def _home(name: str, module: ast.Module, file: Path) -> Path:
    """Return the file that defines a class imported by a module."""
    for node in module.body:
        if not isinstance(node, ast.ImportFrom) or name not in {one.name for one in node.names}:
            continue
        parts = (node.module or "").split(".")
        if node.level:
            return file.parents[node.level - 1].joinpath(*parts).with_suffix(".py")
        folder = package_folder(parts[0])
        relative = _HOMES.get((node.module or "", name))
        if folder is not None and relative is not None:
            return folder / relative
    raise _NotFoundError(name)


def _is_settable(statement: ast.AnnAssign) -> bool:
    if ast.unparse(statement.annotation).startswith("ClassVar"):
        return False
    value = statement.value
    return not (
        isinstance(value, ast.Call)
        and any(
            word.arg == "init" and isinstance(word.value, ast.Constant) and not word.value.value
            for word in value.keywords
        )
    )


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
