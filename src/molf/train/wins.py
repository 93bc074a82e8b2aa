"""Counting which experts win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molf.core.routing import Decision


class Wins:
    """Share of layers that each expert won, over the whole run and since the last look.

    With `top_k` above 1 several experts win a layer, and the shares sum to `top_k`.

    Args:
        experts: Names of all experts, so that one that never wins is reported with 0.
    """

    def __init__(self, experts: Iterable[str]) -> None:
        self._experts = tuple(experts)
        self._total: Counter[str] = Counter()
        self._recent: Counter[str] = Counter()
        self._decisions = 0
        self._recent_decisions = 0

    def add(self, routing: Mapping[str, Decision]) -> None:
        """Count one step's decisions, but for layers whose experts all score 0.

        That is every layer in the first step of a warm-up: the rate is 0, nothing moves, and a tie
        is no win.
        """
        for decision in routing.values():
            if any(decision.scores.values()):
                self._recent.update(decision.winners)
                self._recent_decisions += 1

    def shares(self) -> dict[str, float]:
        """Share of all decisions that each expert won."""
        self.take_recent()
        return self._divide(self._total, self._decisions)

    def take_recent(self) -> dict[str, float]:
        """Share of the decisions since the last call."""
        shares = self._divide(self._recent, self._recent_decisions)
        self._total += self._recent
        self._decisions += self._recent_decisions
        self._recent = Counter()
        self._recent_decisions = 0
        return shares

    def _divide(self, wins: Counter[str], decisions: int) -> dict[str, float]:
        return {name: wins[name] / decisions for name in self._experts} if decisions else {}
