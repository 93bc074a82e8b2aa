"""A fraction where a whole number is asked for is an error, and is not rounded."""

from __future__ import annotations

from types import NoneType
from typing import get_args

from cyclopts import App, ArgumentCollection, CoercionError


def refuse_fractions(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Check the numbers given for options that take an int, on the command line or in a recipe.

    Raises:
        CoercionError: A number has a fraction.
    """
    for argument in arguments:
        kinds = set(get_args(argument.hint)) - {NoneType} or {argument.hint}
        if kinds != {int}:
            continue
        for token in argument.tokens:
            if _has_fraction(token.value):
                origin = f" from {token.source}" if token.source not in ("", "cli") else ""
                raise CoercionError(
                    msg=f'"{token.value}"{origin} must be a whole number.',
                    token=token,
                    argument=argument,
                )


def _has_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # no decimal number at all: the conversion says so
        return False
