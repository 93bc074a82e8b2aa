"""The JSON schema of recipes, for editors: completion, descriptions and marks at wrong values."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from cyclopts import Argument

from molf.data.sources import OPTIONS
from molf.job.settings.converters import duration

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_ALONE = ("config", "print_config", "report", "spectra")  # of the command line alone


def recipe_schema() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12), from the options of `molf train`."""
    from molf.cli.app import app

    arguments = app["train"].assemble_argument_collection(parse_docstring=True)
    options = {
        name: _option(argument, name)
        for argument in arguments
        if argument.show and (name := argument.name.lstrip("-").replace("-", "_")) not in _ALONE
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of molf train",
        "type": "object",
        "properties": {**options, "run": {"description": "The record of a run; no option."}},
        "additionalProperties": False,
    }


def _option(argument: Argument, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"description": " ".join((argument.parameter.help or "").split())}
    if choices := argument.get_choices():
        found["enum"] = [*choices, None]
    else:
        found |= _type_of(argument.hint)
    if argument.parameter.converter is duration:  # such as 90m
        found["type"] = ["string", *found["type"]]
    if name in OPTIONS:  # several sources
        found["type"] = ["array", *found["type"]]
    return found


def _type_of(hint: Any) -> dict[str, Any]:
    """Return the types of an option's value; a list may also be given as one value or as text."""
    alternatives = [one for one in get_args(hint) if one is not NoneType]
    if get_origin(hint) is dict:
        return {"type": ["object", "null"]}
    if get_origin(hint) is tuple:
        kind = _TYPES[alternatives[0]]
        return {"type": ["array", *dict.fromkeys((kind, "string")), "null"]}
    if get_origin(hint) is None:
        return {"type": [_TYPES[hint], "null"]}
    kinds: dict[str, None] = {}
    for one in alternatives:
        kinds |= dict.fromkeys(_type_of(one)["type"])
    return {"type": list(kinds)}
