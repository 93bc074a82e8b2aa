"""Folders and files: sizes, no circles of imports, and names that stay free."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import molf

ROOT = Path(molf.__file__).parent
REPOSITORY = Path(__file__).resolve().parents[1]
MOST_FILES, MOST_LINES = 22, 450  # of a folder, of a file
# Importing these needs an extra that the tests do without, or starts a program.
NOT_IMPORTED = ("molf.__main__", "molf.core.execute.triton", "molf.sql.serve")


def modules() -> dict[str, Path]:
    """Every module of the package, by name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("molf", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> set[str]:
    """The modules of the package that a file imports, also in functions and for types alone."""
    found = set()
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
    return {name for name in found if name in known}


@cache
def import_statements(path: Path) -> list[ast.Import | ast.ImportFrom]:
    """The statements of a file; parsing all files takes a second."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]


def circles(edges: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """The groups of nodes that reach one another."""
    reached: dict[str, set[str]] = {}
    for start in edges:
        seen, waiting = set(), list(edges[start])
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += edges.get(node, ())
        reached[start] = seen
    groups = {
        frozenset(other for other in reached if node in reached[other] and other in reached[node])
        for node in reached
    }
    return [set(group) for group in groups if len(group) > 1]


def folder_of(name: str) -> str:
    """The folder under `src/molf` that a module is in; its own name for a file there."""
    return name.split(".")[1] if "." in name else name


def test_no_circle_of_files():
    known = modules()
    edges = {name: imports(path, known) - {name, "molf"} for name, path in known.items()}
    assert circles(edges) == []


def test_no_circle_of_folders():
    known = modules()
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        if name != "molf":
            own = edges.setdefault(folder_of(name), set())
            own |= {folder_of(one) for one in imports(path, known) if one != "molf"}
    assert circles({name: found - {name} for name, found in edges.items()}) == []


def imports_of_later(order: list[str], edges: Mapping[str, set[str]]) -> list[str]:
    """The folders that import one that comes after them in an order."""
    return [
        f"{name} imports {other}"
        for place, name in enumerate(order)
        for other in order[place + 1 :]
        if other in edges[name]
    ]


def test_folders_import_those_above_them_in_the_table_of_contributing():
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    order = re.findall(r"^\| `src/molf/(\w+)`", text, re.MULTILINE)
    edges = children("molf", modules())
    assert sorted(order) == sorted({path.parent.name for path in ROOT.glob("*/__init__.py")})
    assert imports_of_later(order, edges) == []
    assert imports_of_later(["cli", "tasks"], edges) == ["cli imports tasks"]


def test_folders_of_core_import_those_below_them_in_the_order_of_the_map():
    text = " ".join((REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").split())
    (found,) = re.findall(r"A folder imports those below it in this order: (.*?)\.", text)
    order = re.findall(r"`(\w+)`", found)
    assert sorted(order) == sorted(
        {path.parent.name for path in (ROOT / "core").glob("*/__init__.py")}
    )
    assert imports_of_later(order[::-1], children("molf.core", modules())) == []


def children(folder: str, known: Mapping[str, Path]) -> dict[str, set[str]]:
    """The folders and files in a folder, by name, with those of them that each imports."""
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        if name.startswith(f"{folder}."):
            own = name.removeprefix(f"{folder}.").split(".")[0]
            found = {one for one in imports(path, known) if one.startswith(f"{folder}.")}
            reached = {one.removeprefix(f"{folder}.").split(".")[0] for one in found}
            edges.setdefault(own, set()).update(reached - {own})
    return edges


def test_no_circle_of_subfolders():
    """The folders inside of a folder are in layers, also by way of the files beside them."""
    known = modules()
    folders = {name for name, path in known.items() if path.name == "__init__.py"}
    found = [
        (folder, circle)
        for folder in sorted(folders)
        for circle in circles(children(folder, known))
        if sum(f"{folder}.{name}" in folders for name in circle) > 1
    ]
    assert found == []


def test_circles_of_subfolders_are_found(tmp_path):
    for name, text in (("a/x", "import p.b.y"), ("f", "from p.a import x"), ("b/y", "import p.f")):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    known = {
        ".".join(("p", *path.relative_to(tmp_path).with_suffix("").parts)): path
        for path in tmp_path.rglob("*.py")
    }
    assert circles(children("p", known)) == [{"a", "b", "f"}]


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [{"a", "b", "c"}]
    assert circles({"a": ["b"], "b": ["c"], "c": []}) == []


def test_folders_and_files_stay_small():
    known = modules()
    files = Counter(path.parent for path in known.values())
    assert {str(folder): count for folder, count in files.items() if count > MOST_FILES} == {}
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in known.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_every_module_is_imported_and_public_names_stay_free():
    """`molf.train` and its like are functions, no packages."""
    for found in pkgutil.walk_packages(molf.__path__, "molf."):
        if not found.name.startswith(NOT_IMPORTED):
            importlib.import_module(found.name)
    for name in ("train", "evaluate", "plan", "find_rates", "probe"):
        assert not isinstance(getattr(molf, name, None), types.ModuleType)
        assert not list((ROOT / name).rglob("*.py"))
