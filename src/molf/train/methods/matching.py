"""The rank that gives an adapter as many parameters as plain LoRA."""

from __future__ import annotations

from collections.abc import Callable


def matching_rank(parameters: Callable[[int], int], wanted: int) -> int:
    """Return the rank whose parameters come closest to a number; the lower of two as close.

    Args:
        parameters: Parameters of the adapter with a rank; more with every rank.
        wanted: How many there should be.
    """
    rank = 1
    while parameters(rank) < wanted:
        rank += 1
    lower = max(rank - 1, 1)
    return min((lower, rank), key=lambda candidate: abs(parameters(candidate) - wanted))
