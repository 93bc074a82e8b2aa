"""Check the text of each option before it is converted, from the command line or a recipe.

Integers with a fraction, integers that are too large, and empty paths or names are rejected.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from cyclopts import App, Argument, ArgumentCollection, CoercionError

from molf.errors import InputError
from molf.job.settings.converters import TOO_LARGE, is_too_large

_EMPTY = "is empty: leave it out for the default"  # Path("") would be the current directory
_FREE = "--training_args"  # its values may be empty


def check_values(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Check the texts given for options and arguments.

    Raises:
        CoercionError: A number has a fraction or is too large, or a name or path is empty.
    """
    for argument in arguments:
        for token in argument.tokens:
            fault = _fault(argument, token.value)
            if fault is not None:
                name = "" if argument.name.startswith("-") else f"{argument.name}: "
                origin = f" from {token.source}" if token.source not in ("", "cli") else ""
                raise CoercionError(
                    msg=f'{name}"{token.value}"{origin} {fault}.', token=token, argument=argument
                )


def check_directory(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Reject a deleted working directory, in which libraries would fail later.

    Raises:
        InputError: The system has no path for the working directory.
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
    if int in kinds and kinds <= {int, str}:
        if _has_fraction(text):
            return "must be a whole number"
        if is_too_large(text):
            return TOO_LARGE
    # Booleans and numbers report an empty text themselves.
    is_text = kinds <= {int, str, Path} and kinds != {int}
    if is_text and not text.strip() and not argument.name.startswith(_FREE):
        return _EMPTY
    return None


def _kinds(hint: Any) -> set[Any]:
    """Return the types of a hint, without None."""
    alternatives = set(get_args(hint)) if NoneType in get_args(hint) else {hint}
    return alternatives - {NoneType}


def _has_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # not a number: the conversion reports it
        return False
