"""Convert the text of options to values, from the command line or YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import CoercionError, Token

TOO_LARGE = "must be below 2**63"

_UNITS = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
_NUMBER = r"\d+(?:\.\d+)?"
_KINDS = {int: "whole numbers", float: "numbers"}


def numbers(kind: type[int] | type[float]) -> Callable[[Any, Sequence[Token]], tuple[Any, ...]]:
    """Return a converter of numbers separated by commas, or of a YAML list of them."""

    def convert(type_: Any, tokens: Sequence[Token]) -> tuple[Any, ...]:
        rule = f"must be {_KINDS[kind]} separated by commas"
        try:
            converted = tuple(kind(text) for text in _split(tokens))
        except ValueError:
            raise _wrong(tokens, rule) from None
        if not converted:
            raise _wrong(tokens, rule)
        # torch stores integers in 64 bits.
        if kind is int and any(map(is_too_large, _split(tokens))):
            raise _wrong(tokens, TOO_LARGE)
        return converted

    return convert


def is_too_large(text: str) -> bool:
    """Return whether a text is an integer that exceeds torch's int64."""
    try:
        return abs(int(text)) >= 2**63
    except ValueError:  # no integer, or more digits than `int` converts
        return text.strip("+-").isdecimal()


def duration(type_: Any, tokens: Sequence[Token]) -> float:
    """Convert a time such as `90m`, `1h30m` or a number of seconds to seconds."""
    text = "".join(token.value for token in tokens).replace(" ", "")
    try:
        return float(text)
    except ValueError:
        found = re.fullmatch("".join(rf"(?:({_NUMBER}){unit})?" for unit in _UNITS), text)
    if not text or found is None:
        raise _wrong(tokens, "must be a time such as 90m, 1h30m or 2d, or a number of seconds")
    parts = zip(found.groups(), _UNITS.values(), strict=True)
    return sum(float(count) * seconds for count, seconds in parts if count is not None)


def words(type_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Convert words separated by commas, or a YAML list of them; an empty text gives ()."""
    found = _split(tokens)
    if not all(found):
        raise _wrong(tokens, "must be words separated by commas")
    return found


def patterns(type_: Any, tokens: Sequence[Token]) -> str | tuple[str, ...]:
    """Convert module patterns: `all-linear`, name endings, or a regular expression."""
    # Module names consist of words and dots, so a text with other characters is an expression.
    if len(tokens) == 1:
        text = tokens[0].value
        if text == "all-linear" or not re.fullmatch(r"[\w.,\s-]*", text):
            return text
    return words(type_, tokens)


def _split(tokens: Sequence[Token]) -> tuple[str, ...]:
    if len(tokens) == 1 and not tokens[0].value.strip():
        return ()  # `[]` in YAML comes as an empty text
    return tuple(word.strip() for token in tokens for word in token.value.split(","))


def _wrong(tokens: Sequence[Token], rule: str) -> CoercionError:
    """Return an error that names the option and, for a recipe, the file."""
    given = ",".join(token.value for token in tokens)
    source = tokens[0].source
    origin = f" from {source}" if source not in ("", "cli") else ""
    return CoercionError(msg=f'"{given}"{origin} {rule}.', token=tokens[0])
