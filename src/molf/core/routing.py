"""From scores to winners: which experts of a layer take this step's update."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple


class Decision(NamedTuple):
    """What one layer decided in one step.

    Attributes:
        winners: Names of the experts that took the update, in expert order.
        scores: Score of every expert of the layer. With a control score these are the EPD scores,
            which the control did not follow.
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

    The highest scores win; among equals the lowest index does. The controls look at less: `"full"`
    at nothing, `"lora"` at the LoRA experts alone, and `"random"` draws `top_k` experts with a
    generator that depends on (seed, layer, step) only, so that a resumed or differently sharded run
    draws the same.

    Args:
        scores: One score per expert, in expert order.
        score: The kind of score, see `MoLFConfig.score`.
        top_k: How many experts win.
        has_full: Whether expert 0 is `full`.
        layer: The layer's name.
        step: The layer's step counter before this step.
        seed: `MoLFConfig.seed`.
    """
    experts = range(len(scores))
    if score == "full":
        return (0,)
    if score == "random":
        drawn = random.Random(f"{seed}/{layer}/{step}").sample(experts, top_k)
        return tuple(sorted(drawn))
    eligible = experts[1:] if score == "lora" and has_full else experts
    best_first = sorted(eligible, key=lambda expert: (-scores[expert], expert))
    return tuple(sorted(best_first[:top_k]))
