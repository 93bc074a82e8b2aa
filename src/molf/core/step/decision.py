"""Result of the choice in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Decision(NamedTuple):
    """Winners and scores of one layer in one step.

    Attributes:
        winners: Names of the updated experts, in expert order.
        scores: Score of every expert. Controls have EPD scores, or those of the score they name.
    """

    winners: tuple[str, ...]
    scores: dict[str, float]

    @classmethod
    def of(
        cls, experts: Sequence[str], winners: Sequence[int], scores: Sequence[float]
    ) -> Decision:
        """Build from the names of all experts and the indices of the winners."""
        names = tuple(experts[winner] for winner in winners)
        return cls(names, dict(zip(experts, scores, strict=True)))
