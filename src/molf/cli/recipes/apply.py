"""Read options from a recipe (`--config`) or from a run (`--resume`).

The command line takes precedence over a recipe, and a recipe over the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.argument import update_argument_collection

from molf.cli.recipes.shipped import find_recipe
from molf.data.sources import with_joined_sources
from molf.errors import InputError
from molf.inputs import read_text
from molf.masking import learn
from molf.paths import check_path, settled
from molf.ranks import launched_count

_RECORD = "run"  # the record of the run in its config.yaml; no option
_NESTED = "training_args"
_MAX_BYTES = 64 * 2**10  # shipped recipes have 2 KiB; YAML of this size takes 2 s to parse

# Of this call alone: the run's own values would not be meant.
_OWN = ("output_dir", "overwrite", "resume", "dry_run")
_NO = ("false", "no", "f", "n", "0")
_RESUMING = (("train",), ("plan",), ("data",))  # others that have the option refuse it


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


def apply_run(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Apply the options of the run to resume to options absent from command line and recipe.

    Raises:
        InputError: There is no run to resume, or an option must be given again.
    """
    output = arguments.get("--output_dir", default=None)
    if commands not in _RESUMING or output is None or not _is_on(arguments, "--resume"):
        return
    # The check of the options rejects these.
    if not output.tokens or _is_on(arguments, "--overwrite"):
        return
    # Imports the settings, which most commands do not need.
    from molf.job.record.resumed_run import (
        is_started,
        split_again,
        stored_options,
        stored_processes,
    )

    given = {argument.name.lstrip("-") for argument in arguments if argument.tokens}
    path = Path(output.tokens[-1].value)
    check_path(path, "output_dir")
    path = settled(path)
    if not is_started(path):
        if not given - {*_OWN, "config"} and "config" not in given:
            raise InputError(
                f"output_dir {path} holds no run to resume, and no options of a new one are given."
            )
        return  # a new run, as every start of a job script after the first resumes
    options, masked = stored_options(path)
    missing = [name for name in masked if name not in given]
    if missing:
        raise InputError(
            f"{path} was started with {missing[0]}={options[missing[0]]} and a query or user that "
            f"are not stored. Give --{missing[0]} again, with the whole address."
        )
    known = {name: value for name, value in options.items() if name not in _OWN}
    if commands == ("train",):
        keeps_size = "per_device_train_batch_size" in given
        split_again(known, stored_processes(path), launched_count(), keeps_size=keeps_size)
    given_by(path / "config.yaml", known)(app, commands, arguments)


def _is_on(arguments: ArgumentCollection, name: str) -> bool:
    """Return whether a boolean option is given and not false."""
    tokens = getattr(arguments.get(name, default=None), "tokens", [])
    return bool(tokens) and tokens[-1].value.lower() not in _NO


def given_by(path: Path, options: Mapping[str, Any]) -> Callable[..., None]:
    """Return a cyclopts config function that applies the options of a recipe."""

    # Not cyclopts' own `Dict`: it skips options that have the name of a command.
    def give(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        update_argument_collection(
            with_joined_sources(options), str(path), arguments, root_keys=(), allow_unknown=False
        )
        for argument in arguments:  # null stands for the default
            argument.tokens[:] = [x for x in argument.tokens if x.implicit_value is not None]

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
    from molf.cli.recipes.text import RecipeError, read_options

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
