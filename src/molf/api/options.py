"""Options given from Python, checked as those of a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molf.errors import InputError

_SOURCE = Path("options")  # a place for messages, where a recipe has its file


def parsed(command: str, options: Mapping[str, Any], recipe: str | Path | None = None) -> Any:
    """Return the arguments of a command, from options and a recipe that they replace.

    Args:
        command: `train`, `plan`, `lr`, `probe` or `eval`.
        options: Options by name; sequences, paths and numbers are taken as they are.
        recipe: A YAML file, or the name of a shipped recipe.

    Raises:
        InputError: An option is unknown or wrong, or the recipe cannot be read.
    """
    from cyclopts import CycloptsError

    from molf.cli.recipes.apply import read_recipe, read_recipe_text
    from molf.cli.recipes.shipped import find_recipe
    from molf.cli.recipes.validation import parse_options

    if options.get("config") is not None:  # no command reads it here: it would have no effect
        raise InputError(f"Invalid config={options['config']}. Give a recipe as first argument.")
    known: dict[str, Any] = {}
    if recipe is not None:
        path = find_recipe(str(recipe))
        known = read_recipe(path, read_recipe_text(path))
    given = {name: _plain(value) for name, value in options.items() if value is not None}
    try:
        return parse_options(_SOURCE, command, {**known, **given}, resumes=command == "train")
    except CycloptsError as error:
        raise InputError(" ".join(str(error).replace(f" from {_SOURCE}", "").split())) from error


def _plain(value: Any) -> Any:
    """Return a value as a recipe would have it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return value
