"""`molf recipes`: list, copy and check recipes."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from molf.cli.recipes.shipped import find_recipe, recipe_names, shipped_recipe
from molf.errors import InputError
from molf.inputs import special_kind
from molf.paths import check_path, expanded
from molf.shown import as_line, json_text

if TYPE_CHECKING:
    from molf.job.settings.settings import TrainSettings

_SHOWN = {"method": "any", "task": "", "model": "shipped"}  # with the text where it is not given
_WRONG_INPUT = 2
_WIDE = 1000  # columns; keeps each recipe on one line for grep


def list_recipes(
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print the shipped recipes.

    Args:
        as_json: Print a list of objects instead of a table.
    """
    rows = [_describe(shipped_recipe(name)) for name in recipe_names()]
    if as_json:
        sys.stdout.write(json_text(rows, indent=2) + "\n")
        return
    from rich.table import Table

    from molf.console import PlainConsole

    table = Table(box=None, pad_edge=False)
    for column in ("name", *_SHOWN, "description"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row.values())
    PlainConsole(width=_WIDE).print(table)


def copy_recipe(
    name: str,
    destination: Path | None = None,
    /,
    *,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Copy a shipped recipe, to be changed.

    Args:
        name: Its name.
        destination: A file or a directory; NAME.yaml here if not given.
        overwrite: Replace a file that is there.
    """
    from molf.disk.files import write_text

    source = shipped_recipe(name)
    target = Path(source.name if destination is None else expanded(destination))
    check_path(target, "dest")
    if target.is_dir():
        target /= source.name
    kind = special_kind(target)
    if kind is not None:
        raise InputError(f"{target} is {kind}, which a recipe does not replace. Give another name.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists. Give --overwrite to replace it, or another name.")
    if not target.parent.is_dir():
        raise InputError(f"{target} cannot be written: there is no directory {target.parent}.")
    command = as_line(f"molf train --config {shlex.quote(str(target))}")
    # The first line is the run command, which now names the copy.
    _, _, rest = source.read_text(encoding="utf-8").partition("\n")
    try:
        write_text(target, f"# {command}\n{rest}")
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}.") from error
    sys.stdout.write(f"{command}\n")


def validate_recipes(*recipes: str) -> int:
    """Check every option of recipes without running anything.

    Args:
        recipes: YAML files, or names of shipped recipes.

    Returns:
        The exit code: 2 if any has an error.
    """
    from molf.cli.lines import say
    from molf.cli.recipes.validation import validate_recipe

    if not recipes:
        raise InputError("Give the recipes to check: YAML files, or names of shipped ones.")
    wrong = False
    for recipe in recipes:
        try:
            found = validate_recipe(find_recipe(recipe))
        except InputError as error:
            wrong = True
            say("error", str(error))
            continue
        for line in found.warnings:
            say("warning", f"{recipe}: {line}")
        for line in found.errors:
            say("error", f"{recipe}: {line}")
        if found.errors:
            wrong = True
        else:
            sys.stdout.write(f"{as_line(recipe)}: ok (molf {found.command})\n")
    return _WRONG_INPUT if wrong else 0


def print_options(settings: TrainSettings) -> None:
    """Check the options of a training, and print all of them as a recipe.

    Raises:
        InputError: An option is wrong or missing.
    """
    import yaml

    from molf.job.run import checked
    from molf.masking import mask

    options: dict[str, Any] = mask(checked(settings, datetime.now()).as_options())
    # Of one call alone; the default of output_dir has the time in it.
    for name in ("overwrite", "resume", "dry_run"):
        del options[name]
    if settings.output_dir is None:
        del options["output_dir"]
    sys.stdout.write(yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


def print_schema() -> None:
    """Print the JSON schema of recipes, for an editor."""
    from molf.cli.recipes.schema import recipe_schema

    sys.stdout.write(json_text(recipe_schema(), indent=2) + "\n")


def _describe(path: Path) -> dict[str, str]:
    """Return a recipe's name, main options and description, the second line of its file."""
    import yaml

    text = path.read_text(encoding="utf-8")
    options = yaml.safe_load(text)
    return {
        "name": path.stem,
        **{name: str(options.get(name, other)) for name, other in _SHOWN.items()},
        "description": text.splitlines()[1].lstrip("# "),
    }
