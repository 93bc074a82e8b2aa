"""Checks of the values in a record."""

from __future__ import annotations

import re
from typing import Any

from molf.errors import InputError


def text_value(value: Any, where: str) -> str:
    """A value that must be a text.

    Args:
        value: The value.
        where: The record and field that it is from, for messages.

    Raises:
        InputError: It is something else, or a text that cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        raise InputError(f"{where} must be a text, not {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise InputError(f"{where} holds half a character (an unpaired surrogate).") from error
    return value


def filled_text(value: Any, where: str) -> str:
    """A text that must hold more than white space."""
    text = text_value(value, where)
    if not text.strip():
        raise InputError(f"{where} must not be empty.")
    return text


def optional_text(value: Any, where: str) -> str:
    """A text, trimmed; the empty one in place of null."""
    return "" if value is None else text_value(value, where).strip()


def integer_value(value: Any, where: str) -> int:
    """A value that must be a whole number, or the text of one: CSV holds texts alone."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]{1,18}", value.strip()):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # columns with nulls become floats in pandas
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InputError(f"{where} must be a whole number, not {value!r:.100}.")


def text_list(value: Any, where: str) -> list[str]:
    """A value that must be a list of texts that hold more than white space."""
    return [filled_text(item, f"{where}[{i}]") for i, item in enumerate(list_value(value, where))]


def list_value(value: Any, where: str) -> list[Any]:
    """A value that must be a list."""
    if not isinstance(value, list):
        raise InputError(f"{where} must be a list, not {type(value).__name__}.")
    return value


def object_value(value: Any, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """A value that must be an object with the given fields."""
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, not {type(value).__name__}.")
    for name in fields:
        if value.get(name) is None:
            raise InputError(f"{where} lacks the field {name!r}.")
    return value
