"""What is checked of every option's text before it is converted, from a recipe as well.

A whole number is not rounded, nor what no machine counts to; a path or a name is not empty: an
empty path would be the current directory.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from cyclopts import App, Argument, ArgumentCollection, CoercionError

from molf.errors import InputError
from molf.train.converters import TOO_LARGE, is_too_large

_EMPTY = "is empty: leave it out for the default"
_FREE = "--training_args"  # what trackers and trainers are given may be empty


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Check the texts given for options and arguments.

    Raises:
        CoercionError: A number has a fraction or is too large, or a name or path is empty.
    """
    for argument in arguments:
        for token in argument.tokens:
            if token.implicit_value is None:  # null in a recipe, whose text is empty
                continue
            fault = _fault(argument, token.value)
            if fault is not None:
                name = "" if argument.name.startswith("-") else f"{argument.name}: "
                origin = f" from {token.source}" if token.source not in ("", "cli") else ""
                raise CoercionError(
                    msg=f'{name}"{token.value}"{origin} {fault}.', token=token, argument=argument
                )


def check_directory(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse to work in a directory that is gone: half of what is called would fail, and late.

    Raises:
        InputError: The working directory cannot be asked for.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise InputError(
            f"The working directory cannot be used ({error.strerror}): it was probably deleted. "
            "Change to another one and start again."
        ) from error


def _fault(argument: Argument, text: str) -> str | None:
    kinds = _kinds(argument.hint)
    if kinds == {int}:
        if _has_fraction(text):
            return "must be a whole number"
        return TOO_LARGE if is_too_large(text) else None
    if kinds <= {str, Path} and not text.strip() and not argument.name.startswith(_FREE):
        return _EMPTY
    return None


def _kinds(hint: Any) -> set[Any]:
    """The types that a hint allows beside None."""
    alternatives = set(get_args(hint)) if NoneType in get_args(hint) else {hint}
    return alternatives - {NoneType}


def _has_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # no decimal number at all: the conversion says so
        return False
