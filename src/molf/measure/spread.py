"""Choose entries spread evenly over a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(entries: Sequence[T], most: int) -> list[T]:
    """Return at most `most` entries in order, at equal distances, the first among them."""
    count = min(most, len(entries))
    return [entries[position * len(entries) // count] for position in range(count)]
