"""`--config RECIPE.yaml`: the options of a command, flat, in a file; the command line wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict

from molf.cli.shipped import find_recipe
from molf.errors import InputError

if TYPE_CHECKING:
    import yaml

_RECORD = "run"  # what a run's config.yaml holds beside options


def apply_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Give the options of the recipe, if one is named, to those that the command line left out.

    Raises:
        InputError: The file is missing, not UTF-8, no YAML, or no mapping.
    """
    option = arguments.get("--config", default=None)
    if option is None or not option.tokens:
        return
    path = find_recipe(option.tokens[0].value)
    recipe = Dict(read_recipe(path), source=str(path), use_commands_as_keys=False)
    recipe(app, commands, arguments)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the options of a recipe.

    Raises:
        InputError: The file is missing, not UTF-8, no YAML, or no mapping of names.
    """
    import yaml

    try:
        options = yaml.load(path.expanduser().read_text(encoding="utf-8-sig"), _recipe_loader())
    except UnicodeDecodeError as error:
        raise InputError(f"config {path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"config {path} cannot be read: {error.strerror}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise InputError(f"config {path} is not YAML: {error.problem}{where}.") from error
    except yaml.YAMLError as error:  # a character that no YAML text may hold
        raise InputError(f"config {path} is not YAML: {error}.") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InputError(
            f"config {path} must hold options as 'name: value', not a {type(options).__name__}."
        )
    for name in options:
        if not isinstance(name, str):
            raise InputError(f"config {path}: {name!r} is not the name of an option.")
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


def _recipe_loader() -> type[yaml.SafeLoader]:
    """YAML's safe loader, made to refuse a name given twice: one of the two would be ignored."""
    import yaml

    class RecipeLoader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue  # refused below, as no name
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return RecipeLoader
