"""Split the records of a measurement over processes, and gather the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

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


def in_step(model: Any, act: Callable[[], object], idle: Callable[[], object]) -> None:
    """Call `act` in each process, with equally many forward passes of a model that they share.

    A pass of a sharded model gathers the weights of each block from all processes, so a process
    that has fewer passes would leave the others waiting. Before each pass the processes count
    those that still run; the others take part by a pass of their own. If `act` fails in one
    process, all raise its error.

    Args:
        model: The model in shards; its passes are counted.
        act: May run any number of passes.
        idle: Runs one pass.
    """
    ranks, is_inside, error = _sharing.get(), False, None

    def enter(*_: Any) -> None:
        nonlocal is_inside
        ranks.largest([1])
        is_inside = True

    def leave(*_: Any) -> None:
        nonlocal is_inside
        is_inside = False

    # Before the hook that gathers weights: the order of both is the same in all processes.
    hooks = (
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave),
    )
    try:
        act()
    except Exception as failed:
        if is_inside:
            raise  # the others wait within the pass, until this process ends
        error = failed
    finally:
        for hook in hooks:
            hook.remove()
    while ranks.largest([0]) == [1]:
        idle()
    _free_gathered(model)

    def end() -> None:
        if error is not None:
            raise error

    ranks.everywhere(end)


def _free_gathered(model: Any) -> None:
    """Free the gathered weights that a forward pass without a backward pass has left."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


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
