"""Counts the decisions of a routed training, layer by layer, while it runs or from its log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from molf.core.assignment.assigned import FULL, Evidence
from molf.core.scores.rules import score_margin


class LayerHistory:
    """The decisions of one layer so far.

    Args:
        experts: Names of all experts, `full` first.
    """

    __slots__ = ("_changes", "_decisions", "_last", "_last_change", "_margins", "_wins")

    def __init__(self, experts: Iterable[str]) -> None:
        self._wins = dict.fromkeys(experts, 0)
        self._decisions = self._changes = 0
        self._margins = 0.0
        self._last: tuple[str, ...] = ()
        self._last_change: int | None = None

    def add(self, step: int, winners: Iterable[str], scores: Mapping[str, float]) -> None:
        """Count one decision, unless all scores are 0.

        Args:
            step: Number of the step, from 1.
            winners: Names of the winning experts.
            scores: Score of every expert.
        """
        # At learning rate 0, the first step of a warm-up, all scores are 0: a tie is no win.
        if not any(scores.values()):
            return
        won = tuple(sorted(winners))
        for name in won:
            self._wins[name] += 1
        if self._last not in ((), won):
            self._changes += 1
            self._last_change = step
        self._last = won
        self._decisions += 1
        if FULL in scores and len(scores) > 1:
            lora = max(score for name, score in scores.items() if name != FULL)
            self._margins += score_margin(scores[FULL], lora)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of all experts."""
        return tuple(self._wins)

    def evidence(self) -> Evidence:
        """Return the counts."""
        has_margin = FULL in self._wins and len(self._wins) > 1 and self._decisions > 0
        return Evidence(
            decisions=self._decisions,
            wins=tuple(self._wins.items()),
            changes=self._changes,
            last_change=self._last_change,
            margin=round(self._margins / self._decisions, 6) if has_margin else None,
        )

    def as_values(self) -> list[Any]:
        """Return plain values, for an optimizer's state; `of_values` is the inverse."""
        wins = list(self._wins.values())
        last = [list(self._wins).index(name) for name in self._last]
        return [self._decisions, wins, self._changes, self._last_change, self._margins, last]

    @classmethod
    def of_values(cls, experts: Iterable[str], values: Iterable[Any]) -> LayerHistory:
        """Restore from the result of `as_values`.

        Raises:
            ValueError: The values do not belong to these experts.
        """
        names = tuple(experts)
        made = cls(names)
        made._decisions, wins, made._changes, made._last_change, made._margins, last = values
        made._wins = dict(zip(names, wins, strict=True))
        made._last = tuple(sorted(names[index] for index in last))
        return made
