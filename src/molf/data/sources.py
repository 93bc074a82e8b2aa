"""The value of `--data`: one source of records, or several with weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from molf.data.download import is_url
from molf.data.files import data_suffix
from molf.data.stdin import STDIN
from molf.errors import InputError
from molf.paths import absolute, expanded

OPTIONS = ("data", "eval_data", "validation_data")
"""The options whose values are sources."""

MOST_WEIGHT = 1000.0

_WEIGHTED = re.compile(r"(.+):([0-9]+(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class Source:
    """One source of records.

    Attributes:
        place: A file, a folder, a URL, a Hub id, or `-` for standard input.
        weight: Number of times that an epoch has each training record; a fraction is a share of
            the records, drawn by the seed.
    """

    place: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.place if self.weight == 1 else f"{self.place}:{self.weight:g}"


def sources_of(given: str, option: str = "data") -> list[Source]:
    """Return the sources of a value such as `a.jsonl:2,b.jsonl`.

    An existing path is one source, even with a comma or a colon in it. `:NUMBER` is a weight only
    after a path or a URL of a file; after a Hub id it is the name of a configuration.

    Raises:
        InputError: A source is empty, given twice, or has a weight that is not allowed.
    """
    if _exists(given):
        return [Source(given)]
    places: list[str] = []
    for piece in given.split(","):
        # A URL may have a comma before its file name, or in its query.
        if places and is_url(places[-1]) and data_suffix(_weighted(places[-1]).place) is None:
            places[-1] += f",{piece}"
        else:
            places.append(piece)
    if len(places) == 1:
        return [_checked(_weighted(given), option)]
    found = []
    for piece in places:
        if not piece.strip():
            raise InputError(f"{option}: {given!r:.300} has an empty name between its commas.")
        found.append(_checked(_weighted(piece.strip()), option))
    for source in found:
        if [one.place for one in found].count(source.place) > 1:
            way = f" with a weight, such as {source.place}:2" if option == "data" else ""
            raise InputError(f"{option}: {source.place} comes twice. Give it once{way}.")
    return found


def with_joined_sources(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with a list of sources as one text, as the command line has it."""
    return {
        name: ",".join(map(str, value)) if name in OPTIONS and isinstance(value, list) else value
        for name, value in options.items()
    }


def places(given: str | None) -> list[str]:
    """Return the places of all sources of a value; none for None."""
    return [] if given is None else [source.place for source in sources_of(given)]


def absolute_sources(given: str, option: str = "data") -> str:
    """Return a value of `--data` that is valid from any directory: paths become absolute."""
    found = sources_of(given, option)
    return ",".join(str(Source(_absolute(one.place), one.weight)) for one in found)


def _absolute(place: str) -> str:
    return place if place == STDIN else absolute(place)


def _weighted(piece: str) -> Source:
    """Separate a weight from its place."""
    match = _WEIGHTED.fullmatch(piece)
    if match is None or _exists(piece):
        return Source(piece)
    place, weight = match.groups()
    if data_suffix(place) is None and place != STDIN and not _exists(place):
        return Source(piece)
    return Source(place, float(weight))


def _checked(source: Source, option: str) -> Source:
    if not 0 < source.weight <= MOST_WEIGHT:
        raise InputError(
            f"{option}: {source.place} has the weight {source.weight:g}. Must be above 0 and at "
            f"most {MOST_WEIGHT:g}."
        )
    return source


def _exists(place: str) -> bool:
    # "-" is standard input, whatever the directory holds.
    if place == STDIN:
        return False
    try:
        return os.path.exists(expanded(place))
    except InputError:  # no such home directory: reported where it is read
        return False
