"""Type checks of values in a record."""

from __future__ import annotations

import re
from typing import Any

from molf.errors import InputError
from molf.inputs import is_integer


def text_value(value: Any, where: str) -> str:
    """Return a value that must be a text.

    Args:
        value: The value.
        where: The record and field that it is from, for messages.

    Raises:
        InputError: The value is not a text, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise InputError(f"{where} must be a text, not {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON escapes can encode half of a surrogate pair
        raise InputError(f"{where} holds half a character (an unpaired surrogate).") from error
    return value


def filled_text(value: Any, where: str) -> str:
    """Return a text; reject one of white space alone."""
    text = text_value(value, where)
    if not text.strip():
        raise InputError(f"{where} must not be empty.")
    return text


def optional_text(value: Any, where: str) -> str:
    """Return a text without surrounding white space; "" for null."""
    return "" if value is None else text_value(value, where).strip()


def integer_value(value: Any, where: str) -> int:
    """Return a value as an integer; a text of digits is accepted, because CSV has only texts."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # columns with nulls become floats in pandas
    if is_integer(value):
        return int(value)
    raise InputError(f"{where} must be a whole number, not {value!r:.100}.")


def text_list(value: Any, where: str) -> list[str]:
    """Return a list of texts; reject one of white space alone."""
    return [filled_text(item, f"{where}[{i}]") for i, item in enumerate(list_value(value, where))]


def list_value(value: Any, where: str) -> list[Any]:
    """Return a value that must be a list."""
    if not isinstance(value, list):
        raise InputError(f"{where} must be a list, not {type(value).__name__}.")
    return value


def object_value(value: Any, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return a value that must be an object with the given fields."""
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, not {type(value).__name__}.")
    for name in fields:
        if value.get(name) is None:
            raise InputError(f"{where} lacks the field {name!r}.")
    return value
