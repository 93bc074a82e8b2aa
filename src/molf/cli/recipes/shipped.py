"""Find the recipes that come with the package, YAML files, by name."""

from __future__ import annotations

from pathlib import Path

from molf.errors import InputError
from molf.paths import check_path, expanded
from molf.shown import suggestion

_FOLDER = Path(__file__).resolve().parents[2] / "recipes"
_SUFFIX = ".yaml"


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}"))


def shipped_recipe(name: str) -> Path:
    """Return the file of a shipped recipe, given its name with or without `.yaml`.

    Raises:
        InputError: There is no such recipe; the message suggests similar names.
    """
    name = name.removesuffix(_SUFFIX)
    names = recipe_names()
    if name not in names:
        hint = suggestion(name, names, most=3)
        raise InputError(
            f"No shipped recipe is named {name!r}.{hint} `molf recipes ls` lists them."
        )
    return _FOLDER / f"{name}{_SUFFIX}"


def find_recipe(text: str) -> Path:
    """Return the file for `--config TEXT`: the file of that name, else the shipped recipe.

    Raises:
        InputError: Neither exists.
    """
    if not text.strip():
        raise InputError(
            "The name of a recipe is empty. Give a file, or a name of `molf recipes ls`."
        )
    path = expanded(text)
    check_path(path, "config")
    if path.exists():
        return path
    try:
        return shipped_recipe(text)
    except InputError as error:
        raise InputError(f"config {text}: there is no such file. {error}") from error
