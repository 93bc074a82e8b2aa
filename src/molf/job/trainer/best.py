"""The evaluations of a training, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """The step with the lowest loss on the validation part.

    Attributes:
        count: Number of evaluations.
        step: The step; None before the first finite loss.
        loss: Its loss, in nats per token.
        last: The loss of the last evaluation; None before it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.step: int | None = None
        self.loss = math.inf
        self.last: float | None = None

    def add(self, step: int, loss: float) -> bool:
        """Add an evaluation; return whether it is the best so far."""
        self.count += 1
        self.last = loss
        if not loss < self.loss:
            return False
        self.step, self.loss = step, loss
        return True

    @property
    def steps(self) -> tuple[int, ...]:
        """The best step; none before the first finite loss."""
        return () if self.step is None else (self.step,)

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace them."""
        vars(self).update(state)

    def record(self, kept: int) -> dict[str, Any]:
        """Return it for the record of a run; empty without evaluations.

        Args:
            kept: The step whose model is saved.
        """
        if self.step is None:
            return {}
        return {
            "evaluations": self.count,
            "last_loss": None if self.last is None or math.isnan(self.last) else self.last,
            "best_loss": self.loss,
            "best_step": self.step,
            "saved_step": kept,
        }
