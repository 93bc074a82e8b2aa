"""Count the wins of experts, and the changes of winner per layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from molf.core.assignment.assigned import FULL
from molf.core.scores.rules import score_margin

if TYPE_CHECKING:
    from molf.core.step.decision import Decision

Winners = tuple[str, ...]  # the winning experts of a layer, in the order of all experts


@dataclass(frozen=True)
class RoutingSummary:
    """Summary of a run's routing decisions.

    Attributes:
        layers: Number of routed layers.
        decisions: Number of decisions in all steps, without those at rate 0.
        first_step: The first step with a counted decision, from 1.
        won: Each expert's share of the decisions.
        most: The winners of most decisions.
        most_won: Their share.
        unchanged: Number of layers that never changed their winners.
        winners_of_unchanged: Number of these layers by winners, joined with +.
        changes: Number of changes of winners in all layers.
        last_change: The step of the last change; None if there was none.
    """

    layers: int
    decisions: int
    first_step: int
    won: dict[str, float]
    most: Winners
    most_won: float
    unchanged: int
    winners_of_unchanged: dict[str, int]
    changes: int
    last_change: int | None

    def record(self) -> dict[str, Any]:
        """Return it for a run's `config.yaml`."""
        return {**asdict(self), "most": list(self.most)}


class Wins:
    """Counts each expert's wins, over the whole run and since the last call of `take_recent`.

    With `top_k` above 1 several experts win a layer, and the shares sum to `top_k`.

    Args:
        experts: Names of all experts; one that never wins is reported with 0.
    """

    def __init__(self, experts: Iterable[str]) -> None:
        self._experts = tuple(experts)
        self._total: Counter[str] = Counter()
        self._recent: Counter[str] = Counter()
        self._decisions = 0
        self._recent_decisions = 0
        self._together: Counter[Winners] = Counter()
        self._latest: dict[str, Winners] = {}
        self._changes: Counter[str] = Counter()
        self._first_step = 0
        self._last_change: int | None = None
        self._margins: tuple[float, int] = 0.0, 0  # sum and number since the last call

    def add(self, routing: Mapping[str, Decision], step: int) -> None:
        """Count one step's decisions, except layers whose experts all score 0.

        Args:
            routing: The decisions by layer.
            step: The step's number, from 1.
        """
        for layer, decision in routing.items():
            # All scores are 0 in the first step of a warm-up, at rate 0: a tie is no win.
            if not any(decision.scores.values()):
                continue
            if (margin := _margin(decision.scores)) is not None:
                total, count = self._margins
                self._margins = total + margin, count + 1
            self._recent.update(decision.winners)
            self._recent_decisions += 1
            winners = tuple(name for name in self._experts if name in decision.winners)
            self._together[winners] += 1
            self._first_step = self._first_step or step
            if self._latest.setdefault(layer, winners) != winners:
                self._latest[layer] = winners
                self._changes[layer] += 1
                self._last_change = step

    def state_dict(self) -> dict[str, Any]:
        """Return all counts, as values that `torch.load` reads with `weights_only=True`."""
        return {
            "total": dict(self._total),
            "recent": dict(self._recent),
            "decisions": self._decisions,
            "recent_decisions": self._recent_decisions,
            # In order: of equal counts, the first is reported.
            "together": [[list(winners), count] for winners, count in self._together.items()],
            "latest": {layer: list(winners) for layer, winners in self._latest.items()},
            "changes": dict(self._changes),
            "first_step": self._first_step,
            "last_change": self._last_change,
            "margins": list(self._margins),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all counts by those of a state."""
        self._total, self._recent = Counter(state["total"]), Counter(state["recent"])
        self._decisions, self._recent_decisions = state["decisions"], state["recent_decisions"]
        self._together = Counter({tuple(winners): count for winners, count in state["together"]})
        self._latest = {layer: tuple(winners) for layer, winners in state["latest"].items()}
        self._changes = Counter(state["changes"])
        self._first_step, self._last_change = state["first_step"], state["last_change"]
        total, count = state.get("margins", (0.0, 0))  # checkpoints of 0.1 lack it
        self._margins = total, count

    def shares(self) -> dict[str, float]:
        """Return each expert's share of all decisions."""
        self.take_recent()
        return self._divide(self._total, self._decisions)

    def take_recent(self) -> dict[str, float]:
        """Return each expert's share of the decisions since the last call."""
        shares = self._divide(self._recent, self._recent_decisions)
        self._total += self._recent
        self._decisions += self._recent_decisions
        self._recent = Counter()
        self._recent_decisions = 0
        return shares

    def take_margin(self) -> float | None:
        """Return the mean score margin of `full` since the last call; None without any.

        The margin of a decision is `(full - LoRA) / (|full| + |LoRA|)`, LoRA the best expert.
        """
        total, count = self._margins
        self._margins = 0.0, 0
        return total / count if count else None

    def summary(self) -> RoutingSummary | None:
        """Return the summary; None without decisions."""
        shares = self.shares()
        if not self._decisions:
            return None
        ((most, count),) = self._together.most_common(1)
        unchanged = [layer for layer in self._latest if not self._changes[layer]]
        return RoutingSummary(
            layers=len(self._latest),
            decisions=self._decisions,
            first_step=self._first_step,
            won=shares,
            most=most,
            most_won=count / self._decisions,
            unchanged=len(unchanged),
            winners_of_unchanged=dict(Counter("+".join(self._latest[x]) for x in unchanged)),
            changes=self._changes.total(),
            last_change=self._last_change,
        )

    def _divide(self, wins: Counter[str], decisions: int) -> dict[str, float]:
        return {name: wins[name] / decisions for name in self._experts} if decisions else {}


def _margin(scores: Mapping[str, float]) -> float | None:
    """Return the margin of `full` over the best other expert; None without both, or of zeros."""
    full = scores.get(FULL)
    lora = max((score for name, score in scores.items() if name != FULL), default=None)
    if full is None or lora is None or full == lora == 0:
        return None
    margin = score_margin(full, lora)
    return margin if math.isfinite(margin) else None
