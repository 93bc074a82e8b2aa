"""`--config RECIPE.yaml`: the options of a command, flat, in a file; the command line wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from molf.errors import InputError

_RECORD = "run"  # what a run's config.yaml holds beside options


def apply_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the options of the recipe, if one is named, to those that the command line left out.

    Raises:
        InputError: The file is missing, not UTF-8, no YAML, or no mapping.
    """
    option = arguments.get("--config", default=None)
    if option is None or not option.tokens:
        return
    path = Path(option.tokens[0].value)
    recipe = Dict(_read(path), source=str(path), use_commands_as_keys=False)
    recipe(app, commands, arguments)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"config {path} is not YAML: {error.problem}{where}.") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InputError(
            f"config {path} must hold options as 'name: value', not a {type(options).__name__}."
        )
    if "config" in options:
        raise InputError(f"config {path} names another config; a recipe stands alone.")
    if options.get(_RECORD) is not None:
        options.pop(_RECORD)
    extra = options.get("training_args")
    if isinstance(extra, dict):
        # SFTConfig reads its nested values as JSON.
        options["training_args"] = {
            name: json.dumps(value) if isinstance(value, (dict, list)) else value
            for name, value in extra.items()
        }
    return options
