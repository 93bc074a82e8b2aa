"""`--config RECIPE.yaml`: the options of a command, flat, in a file; the command line wins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.argument import update_argument_collection

from molf.cli.shipped import find_recipe
from molf.errors import InputError
from molf.inputs import read_input
from molf.masking import learn

_RECORD = "run"  # what a run's config.yaml holds beside options
_NESTED = "training_args"
_MAX_BYTES = 64 * 2**10  # those shipped have two KiB; YAML of this size is read in two seconds


def apply_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the options of the recipe, if one is named, to those that the command line left out.

    Raises:
        InputError: The file is missing, not UTF-8, no YAML, or no mapping.
    """
    option = arguments.get("--config", default=None)
    if option is None or not option.tokens:
        return
    path = find_recipe(option.tokens[0].value)
    given_by(path, read_recipe(path, read_text(path)))(app, commands, arguments)


def given_by(path: Path, options: Mapping[str, Any]) -> Callable[..., None]:
    """What gives options of a recipe to a command.

    Cyclopts' own `Dict` would pass over, in silence, options that are called as a command is.
    """

    def give(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        update_argument_collection(
            dict(options), str(path), arguments, root_keys=(), allow_unknown=False
        )

    return give


def read_text(path: Path) -> str:
    """Read the text of a recipe.

    Raises:
        InputError: The file is missing, no ordinary one, not UTF-8, or too large.
    """
    content = read_input(path, f"config {path}", most=_MAX_BYTES)
    if len(content) > _MAX_BYTES:
        raise InputError(f"config {path} is no recipe: it is longer than {_MAX_BYTES:,} bytes.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} is not UTF-8 text (byte {error.start}).") from error


def read_recipe(path: Path, text: str) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        path: Its file, for messages.
        text: What that holds.

    Raises:
        InputError: The text is no YAML, no mapping of names, or holds what no option takes.
    """
    from molf.cli.recipe_yaml import RecipeError, read_options

    try:
        options = read_options(text, _NESTED, _RECORD)
    except RecipeError as error:
        raise InputError(f"config {path} {error}") from error
    learn(options)
    if "config" in options:
        raise InputError(f"config {path} names another config; a recipe stands alone.")
    if options.get(_RECORD) is not None:
        options.pop(_RECORD)
    return options
