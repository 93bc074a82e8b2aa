"""`--config RECIPE.yaml`: read options from a file; the command line takes precedence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.argument import update_argument_collection

from molf.cli.shipped import find_recipe
from molf.errors import InputError
from molf.inputs import read_text
from molf.masking import learn

_RECORD = "run"  # the record of the run in its config.yaml; no option
_NESTED = "training_args"
_MAX_BYTES = 64 * 2**10  # shipped recipes have 2 KiB; YAML of this size takes 2 s to parse


def apply_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Apply the recipe of `--config`, if given, to options absent from the command line.

    Raises:
        InputError: The file is missing, not UTF-8, no YAML, or no mapping.
    """
    option = arguments.get("--config", default=None)
    if option is None or not option.tokens:
        return
    path = find_recipe(option.tokens[0].value)
    given_by(path, read_recipe(path, read_recipe_text(path)))(app, commands, arguments)


def given_by(path: Path, options: Mapping[str, Any]) -> Callable[..., None]:
    """Return a cyclopts config function that applies the options of a recipe."""

    # Not cyclopts' own `Dict`: it skips options that have the name of a command.
    def give(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        update_argument_collection(
            dict(options), str(path), arguments, root_keys=(), allow_unknown=False
        )

    return give


def read_recipe_text(path: Path, kind: str = "config") -> str:
    """Read the text of a recipe or a study; `kind` names it in messages.

    Raises:
        InputError: The file is missing, no ordinary file, not UTF-8, or too large.
    """
    return read_text(path, f"{kind} {path}", most=_MAX_BYTES)


def read_recipe(path: Path, text: str) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        path: Its file, for messages.
        text: The content of the file.

    Raises:
        InputError: The text is not YAML, not a mapping of names, or has a value of a wrong kind.
    """
    from molf.cli.recipe_yaml import RecipeError, read_options

    try:
        options = read_options(text, _NESTED, _RECORD)
    except RecipeError as error:
        raise InputError(f"config {path} {error}") from error
    # Options of a recipe may hold tokens, as those of the command line.
    learn(options)
    if "config" in options:
        raise InputError(f"config {path} names another config; a recipe stands alone.")
    # A run's config.yaml is a recipe as well.
    if options.get(_RECORD) is not None:
        options.pop(_RECORD)
    return options
