"""Random draws that are the same on every Python version.

Only `random.Random.random` has a stream that Python promises to keep; `choice`, `shuffle` and
`sample` may change between versions. These helpers use nothing else, so a seed always gives the
same world.
"""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def integer(rng: Random, low: int, high: int) -> int:
    """Draws an integer from `low` to `high`, both included."""
    return low + int(rng.random() * (high - low + 1))


def choice(rng: Random, items: Sequence[T]) -> T:
    """Draws one item."""
    return items[integer(rng, 0, len(items) - 1)]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Returns the items in random order (Fisher-Yates)."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = integer(rng, 0, last)
        result[last], result[other] = result[other], result[last]
    return result


def sample(rng: Random, items: Sequence[T], count: int) -> list[T]:
    """Draws `count` different items.

    Raises:
        ValueError: If there are fewer than `count` items.
    """
    if count > len(items):
        raise ValueError(f"Invalid count={count}. Must be at most {len(items)}.")
    return shuffled(rng, items)[:count]


def balanced(rng: Random, items: Sequence[T], count: int) -> list[T]:
    """Draws `count` items, each item equally often (up to one).

    Within that the draw is random, so no item can be guessed and every item has company.
    """
    result: list[T] = []
    while len(result) < count:
        result += shuffled(rng, items)
    return result[:count]
