"""Choice of the winning experts of a layer from their scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Decision(NamedTuple):
    """Winners and scores of one layer in one step.

    Attributes:
        winners: Names of the updated experts, in expert order.
        scores: Score of every expert. With a control these are the EPD scores, which it ignores.
    """

    winners: tuple[str, ...]
    scores: dict[str, float]


def select_winners(
    scores: Sequence[float],
    *,
    score: str,
    top_k: int,
    has_full: bool,
    layer: str,
    step: int,
    seed: int,
) -> tuple[int, ...]:
    """Return the indices of the winning experts of one layer, ascending.

    The highest scores win; ties go to the lowest index. Controls: `"full"` returns expert 0,
    `"lora"` the best LoRA experts, `"random"` draws `top_k` experts from (seed, layer, step).

    Args:
        scores: One score per expert, in expert order.
        score: `MoLFConfig.score`.
        top_k: Number of winners.
        has_full: Whether expert 0 is `full`.
        layer: Name of the layer.
        step: Step counter of the layer before this step.
        seed: `MoLFConfig.seed`.
    """
    experts = range(len(scores))
    if score == "full":
        return (0,)
    if score == "random":
        # From nothing else, so that a resumed or differently sharded run draws the same.
        drawn = random.Random(f"{seed}/{layer}/{step}").sample(experts, top_k)
        return tuple(sorted(drawn))
    eligible = experts[1:] if score == "lora" and has_full else experts
    best_first = sorted(eligible, key=lambda expert: (-scores[expert], expert))
    return tuple(sorted(best_first[:top_k]))
