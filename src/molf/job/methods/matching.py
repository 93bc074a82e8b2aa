"""Find the rank at which an adapter has as many parameters as plain LoRA."""

from __future__ import annotations

from collections.abc import Callable


def matching_rank(parameters: Callable[[int], int], wanted: int) -> int:
    """Return the rank whose number of parameters is closest to `wanted`; of two, the lower.

    Args:
        parameters: Number of parameters by rank, increasing.
        wanted: The target number.
    """
    # Ranks are small, and each count takes microseconds.
    rank = 1
    while parameters(rank) < wanted:
        rank += 1
    lower = max(rank - 1, 1)
    return min((lower, rank), key=lambda candidate: abs(parameters(candidate) - wanted))
