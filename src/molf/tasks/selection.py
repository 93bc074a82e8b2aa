"""Seeded draws of records; indices always keep the data's order."""

from __future__ import annotations

import random
from collections.abc import Sequence

HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 500


def draw(indices: Sequence[int], maximum: int | None, seed: int) -> list[int]:
    """At most `maximum` of the indices, all of them when None."""
    if maximum is None or maximum >= len(indices):
        return list(indices)
    return sorted(random.Random(seed).sample(indices, maximum))


def hold_out(indices: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Split indices (two at least) into those to train on and a share held out for evaluation.

    A tenth is held out, at least 1 and at most 500.
    """
    count = min(max(1, round(len(indices) * HELD_OUT_SHARE)), HELD_OUT_MOST)
    # A seed of its own: with the seed of `draw`, both would depend on the same random numbers.
    held_out = draw(indices, count, seed + 1)
    chosen = set(held_out)
    return [index for index in indices if index not in chosen], held_out
