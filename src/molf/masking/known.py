"""Collect the secrets given to this process, in options, recipes and environment variables.

They are masked literally in all text: a library may quote a part of an address, or a token without
a recognisable form.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from molf.masking.addresses import MASK, secrets_of
from molf.masking.names import is_secret_name

_SHORTEST = 6  # characters; a shorter secret would be masked inside ordinary words
_SHORTEST_WORD = 8  # characters, for values of letters only in the environment
_LONG = 16  # characters; a secret this long is also masked inside a longer word

_learned: dict[str, str] = {}


def learn(value: Any) -> None:
    """Store the secrets among options, so that messages and files mask them.

    Args:
        value: Options by name, or the arguments of a command.
    """
    for literal, replacement in _secrets_in(value):
        for form in _forms(literal):
            # The first replacement stays: that of a whole address tells more than the mask.
            _learned[form] = _learned.get(form, replacement)


def known_secrets() -> tuple[tuple[str, str], ...]:
    """Return pairs of a secret literal and its replacement, longest first."""
    known = dict(_learned)
    for name, value in os.environ.items():
        if is_secret_name(name) and not _is_place(value) and _is_rare(value):
            known.update((form, MASK) for form in _forms(value))
        if "://" in value and "@" in value:
            for literal, replacement in secrets_of(value):
                if _is_rare(literal):
                    known.update((form, replacement) for form in _forms(literal))
    return tuple(sorted(known.items(), key=lambda entry: -len(entry[0])))


def mask_known(text: str, known: tuple[tuple[str, str], ...]) -> str:
    """Return the text with the literals replaced."""
    if not known:
        return text
    replacements = dict(known)
    return _pattern(known).sub(lambda found: replacements[found[0]], text)


@lru_cache(maxsize=8)
def _pattern(known: tuple[tuple[str, str], ...]) -> re.Pattern[str]:
    parts = []
    for literal, _ in known:
        part = re.escape(literal)
        if len(literal) < _LONG:
            before = r"(?<![A-Za-z0-9])" if literal[0].isalnum() else ""
            after = r"(?![A-Za-z0-9])" if literal[-1].isalnum() else ""
            part = f"{before}{part}{after}"
        parts.append(part)
    return re.compile("|".join(parts))


def _secrets_in(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if is_secret_name(str(name)) and isinstance(entry, (str, int)):
                yield str(entry), MASK
            else:
                yield from _secrets_in(entry)
    elif isinstance(value, (list, tuple)):
        yield from ((secret, MASK) for secret in _option_values(value))
        for entry in value:
            yield from _secrets_in(entry)
    elif isinstance(value, str):
        yield from secrets_of(value.partition("=")[2] if value.startswith("--") else value)


def _option_values(arguments: Iterable[Any]) -> Iterator[str]:
    """Yield the values of secret options in a command line."""
    before = ""
    for argument in map(str, arguments):
        if is_secret_option(before) and not argument.startswith("--"):
            yield argument
        name, has_value, value = argument.partition("=")
        if has_value and is_secret_option(name):
            yield value
        before = argument


def is_secret_option(argument: str) -> bool:
    """Return whether an argument is the name of an option with a secret value."""
    return re.fullmatch(r"--[\w.-]+", argument) is not None and (
        argument == "--key" or is_secret_name(argument)
    )


def _forms(secret: str) -> Iterator[str]:
    """Return the spellings of a secret in addresses, messages and files."""
    forms = (
        secret,
        secret.strip(),
        quote(secret, safe=""),
        unquote(secret),
        repr(secret)[1:-1],
        json.dumps(secret)[1:-1],
    )
    return (form for form in dict.fromkeys(forms) if len(form) >= _SHORTEST)


def _is_rare(value: str) -> bool:
    """Return whether a value is rare enough to be masked everywhere; `false`, say, is not."""
    return len(value) >= _SHORTEST_WORD or (
        len(value) >= _SHORTEST and re.search(r"\d", value) is not None
    )


def _is_place(value: str) -> bool:
    """Return whether a value is the path of a file, which may hold a secret but is none."""
    return value.startswith(("/", "~", ".")) or os.path.exists(value)
