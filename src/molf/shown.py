"""Escape control and invisible characters in text before it is printed or logged.

File names, columns, keys and messages may hold escape sequences, characters that change the writing
direction, or bytes that are not UTF-8 (in paths: lone surrogates). JSON text keeps its value.
"""

from __future__ import annotations

import codecs
import difflib
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: Its heading; may be empty.
        columns: Names of the columns.
        rows: The rows; the first cell names the row.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


LACKING = "molf.spelled"  # value for `errors=`: escape characters that the encoding lacks

_LAYOUT = "\n\t"
_JOINERS = "\u200c\u200d"  # Persian and emoji need them; they do not move other characters


class _Escapes(dict[int, "int | str"]):
    """A table for `str.translate`, filled when a character is first looked up."""

    def __init__(self, escape: Callable[[int], str], keep: str) -> None:
        super().__init__()
        self._escape = escape
        self._keep = keep

    def __missing__(self, code: int) -> int | str:
        character = chr(code)
        is_seen = (
            character.isprintable()
            or character in self._keep
            or unicodedata.category(character) == "Zs"  # spaces, unprintable for `isprintable`
        )
        self[code] = code if is_seen else self._escape(code)
        return self[code]


def _spelled(code: int) -> str:
    return chr(code).encode("unicode_escape").decode("ascii")


def _spelled_in_json(code: int) -> str:
    return json.dumps(chr(code))[1:-1]


def _replace_lacking(error: UnicodeError) -> tuple[str, int]:
    """Escape the characters that an encoding lacks; a handler for `codecs.register_error`."""
    # In JSON's form, so that JSON keeps its value in any encoding.
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_spelled_in_json(ord(character)) for character in lacking), error.end


codecs.register_error(LACKING, _replace_lacking)

_IN_TEXT = _Escapes(_spelled, _LAYOUT + _JOINERS)
_IN_LINE = _Escapes(_spelled, _JOINERS)
_IN_JSON = _Escapes(_spelled_in_json, _LAYOUT + _JOINERS)


def printable(text: str) -> str:
    """Return the text with control characters escaped, except line breaks and tabs."""
    return text if text.isprintable() else text.translate(_IN_TEXT)


def as_line(text: str) -> str:
    """Return the text on one line, with all control characters escaped."""
    return text if text.isprintable() else text.translate(_IN_LINE)


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with all texts in lists and objects changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_texts(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_texts(entry, change) for entry in value)
    return value


def listed(names: Sequence[object], most: int) -> str:
    """Return names separated by commas; of more than `most`, the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, "1 layer" or "1,200 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def option_text(value: object) -> str:
    """Return the value of an option as text; a list as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def suggestion(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return a question with the known names most similar to a wrong one; empty without any."""
    close = difflib.get_close_matches(name, list(known), n=most)
    return f" Did you mean {', '.join(close)}?" if close else ""


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON with control characters escaped; it parses to the same value."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if text.isprintable() else text.translate(_IN_JSON)
