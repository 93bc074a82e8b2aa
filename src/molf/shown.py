"""Texts as they may be shown: what would steer a terminal, or is not to be seen, is spelled out.

File names, columns, keys and messages may hold escape sequences, characters that turn the direction
of writing, or bytes that are no UTF-8 (in paths, as lone surrogates). Whatever is printed or logged
goes through here; texts of JSON keep their value, those of people are for reading alone.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections.abc import Callable
from typing import Any

LACKING = "molf.spelled"  # the handler of characters that an encoding lacks, for `errors=`

_LAYOUT = "\n\t"
_JOINERS = "\u200c\u200d"  # Persian and emoji are written with them, and they move nothing else


class _Escapes(dict[int, "int | str"]):
    """What `str.translate` puts for each character; worked out when one is first met."""

    def __init__(self, escape: Callable[[int], str], keep: str) -> None:
        super().__init__()
        self._escape = escape
        self._keep = keep

    def __missing__(self, code: int) -> int | str:
        character = chr(code)
        is_seen = (
            character.isprintable()
            or character in self._keep
            or unicodedata.category(character) == "Zs"  # spaces, which Python takes for unprintable
        )
        self[code] = code if is_seen else self._escape(code)
        return self[code]


def _spelled(code: int) -> str:
    return chr(code).encode("unicode_escape").decode("ascii")


def _spelled_in_json(code: int) -> str:
    return json.dumps(chr(code))[1:-1]


def _replace_lacking(error: UnicodeError) -> tuple[str, int]:
    """Spell characters out as JSON does, so that JSON keeps its value in any encoding."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_spelled_in_json(ord(character)) for character in lacking), error.end


codecs.register_error(LACKING, _replace_lacking)

_IN_TEXT = _Escapes(_spelled, _LAYOUT + _JOINERS)
_IN_LINE = _Escapes(_spelled, _JOINERS)
_IN_JSON = _Escapes(_spelled_in_json, _LAYOUT + _JOINERS)


def printable(text: str) -> str:
    """A text with its line breaks and tabs, and with other control characters spelled out."""
    return text if text.isprintable() else text.translate(_IN_TEXT)


def as_line(text: str) -> str:
    """The same on one line: line breaks and tabs are spelled out as well."""
    return text if text.isprintable() else text.translate(_IN_LINE)


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON that any terminal and any encoding of Unicode can take, and of that value."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text if text.isprintable() else text.translate(_IN_JSON)
