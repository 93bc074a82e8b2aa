"""Whole numbers: a fraction is an error and not rounded, and so is what no machine counts to."""

from __future__ import annotations

from types import NoneType
from typing import get_args

from cyclopts import App, ArgumentCollection, CoercionError

from molf.train.converters import TOO_LARGE, is_too_large


def check_whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Check the numbers given for options that take an int, on the command line or in a recipe.

    Raises:
        CoercionError: A number has a fraction, or is too large.
    """
    for argument in arguments:
        kinds = set(get_args(argument.hint)) - {NoneType} or {argument.hint}
        if kinds != {int}:
            continue
        for token in argument.tokens:
            rule = None
            if _has_fraction(token.value):
                rule = "must be a whole number"
            elif is_too_large(token.value):
                rule = TOO_LARGE
            if rule is not None:
                origin = f" from {token.source}" if token.source not in ("", "cli") else ""
                raise CoercionError(
                    msg=f'"{token.value}"{origin} {rule}.',
                    token=token,
                    argument=argument,
                )


def _has_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except ValueError:  # no decimal number at all: the conversion says so
        return False
