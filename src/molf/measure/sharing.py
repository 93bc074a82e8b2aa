"""Split the records of a measurement over processes, and gather the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from molf.ranks import ALONE, Ranks

T = TypeVar("T")

_sharing: ContextVar[Ranks] = ContextVar("sharing", default=ALONE)


@contextmanager
def split_over(ranks: Ranks) -> Iterator[None]:
    """Measure a part of the records in each process during the block; all get all results.

    Every process makes the same measurements of the same model in the same order.
    """
    token = _sharing.set(ranks)
    try:
        yield
    finally:
        _sharing.reset(token)


def own_share(items: Sequence[T]) -> list[T]:
    """Return the items of this process; those of all processes are alike if items are sorted."""
    ranks = _sharing.get()
    return list(items[ranks.rank :: ranks.count])


def everywhere(act: Callable[[], T]) -> T:
    """Call `act` in each process; if it fails in one, raise that error in all."""
    return _sharing.get().everywhere(act)


def collect(results: list[T], done: Sequence[int]) -> list[T]:
    """Complete a list of results by those of the other processes, in place.

    Args:
        results: Results by index.
        done: Indices that this process has computed.
    """
    ranks = _sharing.get()
    if ranks.count > 1:
        for part in ranks.gather({index: results[index] for index in done}):
            for index, result in part.items():
                results[index] = result
    return results
