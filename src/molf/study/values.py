"""Check single values of a study file."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from molf.inputs import is_integer
from molf.shown import suggestion


class StudyFileError(ValueError):
    """A wrong value; the message continues a sentence that begins with the file's name."""


class TooManyError(StudyFileError):
    """A file that names too many trials; the reader of the file adds their time.

    Args:
        count: A number of trials that the study has at least.
        text: Their description, as the beginning of the message.
        remedy: The end of the message.
    """

    def __init__(self, count: int, text: str, remedy: str) -> None:
        super().__init__(f"{text}. {remedy}")
        self.count = count
        self.text = text
        self.remedy = remedy


def reject_unknown(content: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise a `StudyFileError` if a mapping has a name that is not known."""
    for name in content:
        if name not in known:
            raise StudyFileError(
                f"{where} has no {name!r}. It has {', '.join(known)}.{suggestion(name, known)}"
            )


def truth(value: Any, where: str) -> bool:
    """Return true or false; YAML files are read as text."""
    known = {True: True, False: False, "true": True, "false": False}
    if not isinstance(value, (bool, str)) or value not in known:
        raise StudyFileError(f"{where}={value!r}. Must be true or false.")
    return known[value]


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return a mapping; None is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise StudyFileError(f"{where} must be a mapping of names to values, not {value!r:.80}.")
    return value


def mappings(content: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """Return the entry of a name: a list of one or more mappings."""
    value = content.get(name)
    if not isinstance(value, list) or not value:
        raise StudyFileError(
            f"{name} must be a list with at least one entry, such as `- name: NAME`."
        )
    return [mapping(entry, f"an entry of {name}") for entry in value]


def text(value: Any, where: str) -> str:
    """Return a text."""
    if value is None or isinstance(value, (list, Mapping, bool)):
        raise StudyFileError(f"{where} is missing or no text: {value!r:.80}.")
    return str(value)


def number(value: Any, where: str) -> float:
    """Return a finite number above 0."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 < found < math.inf:
        raise StudyFileError(f"{where}: {value!r:.80} is no finite number above 0.")
    return found


def whole_number(value: Any, where: str, *, least: int = 1) -> int:
    """Return an integer of at least `least`."""
    if not is_integer(value) or not least <= value < 2**32:
        raise StudyFileError(f"{where}: {value!r:.80} is no whole number of at least {least}.")
    return value


def integers(value: Any, where: str) -> tuple[int, ...]:
    """Return a list of different integers of at least 0."""
    entries = value if isinstance(value, list) else [value]
    found = tuple(whole_number(entry, where, least=0) for entry in entries)
    if not found or len(set(found)) < len(found):
        raise StudyFileError(
            f"{where} must be a list of different whole numbers, not {value!r:.80}."
        )
    return found


def names(value: Any, where: str) -> tuple[str, ...]:
    """Return a list of names; one name is a list of one."""
    entries = value if isinstance(value, list) else [value]
    found = tuple(text(entry, where) for entry in entries)
    if not found:
        raise StudyFileError(f"{where} must have at least one name.")
    return found
