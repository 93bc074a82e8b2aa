"""Random draws that are the same on every Python version.

Python guarantees the sequence of `random.Random.random`, but not those of `choice`, `shuffle` and
`sample`. These helpers call only `random`, so a seed always gives the same world.
"""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def integer(rng: Random, low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def choice(rng: Random, items: Sequence[T]) -> T:
    """Draw one item."""
    return items[integer(rng, 0, len(items) - 1)]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Return the items in random order (Fisher-Yates)."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = integer(rng, 0, last)
        result[last], result[other] = result[other], result[last]
    return result


def sample(rng: Random, items: Sequence[T], count: int) -> list[T]:
    """Draw `count` different items.

    Raises:
        ValueError: If there are fewer than `count` items.
    """
    if count > len(items):
        raise ValueError(f"Invalid count={count}. Must be at most {len(items)}.")
    return shuffled(rng, items)[:count]


def balanced(rng: Random, items: Sequence[T], count: int) -> list[T]:
    """Draw `count` items; the numbers of draws of any two items differ by at most one.

    Their order is random, so no item is likelier than another.
    """
    result: list[T] = []
    while len(result) < count:
        result += shuffled(rng, items)
    return result[:count]
