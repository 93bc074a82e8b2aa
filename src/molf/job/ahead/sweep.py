"""One sweep of a range test: a training whose rate grows exponentially from step to step.

The other rate of the method is held near 0. At its default, the experts with it learn the data in
the first decades of the sweep, and win all updates there, so that the curve would be theirs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.job.trainer.callbacks import unwrapped

Floats = npt.NDArray[np.float64]

DENSE, LORA = "learning_rate", "lora_learning_rate"

_RATIOS = "lora_lr_ratios"  # of a routed group
FIRST = 5
"""Steps whose mean loss is the start."""
_HELD = 1e-15  # rate at which no weight moves
_RECENT = 3  # steps whose mean loss is compared with it
_ABOVE = 1.25  # times the start


class Sweep(TrainerCallback):
    """Sets the rate of each step, and ends the training where its loss diverges.

    Args:
        option: The option whose rate grows, `DENSE` or `LORA`; other rates are held near 0.
        rates: The rate of each step: [steps].
        base: The value of the option that the optimizer is made with, above 0.

    Attributes:
        losses: The loss of each step, before its update. One that is not finite ends the sweep.
        won: The share of layers whose update the experts with this rate won, in each step; empty
            without routing.
        diverged: Whether the loss diverged.
        passes: Passes over the examples.
    """

    def __init__(self, option: str, rates: Floats, base: float) -> None:
        self.option = option
        self.rates = rates
        self.losses: list[float] = []
        self.won: list[float] = []
        self.diverged = False
        self.passes = 0.0
        self._base = base
        # Groups with the multiple of the rate that each had at the start, and whether they are
        # LoRA alone.
        self._groups: list[tuple[dict[str, Any], float, bool]] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the groups that the option changes."""
        factors = {p for name, p in model.named_parameters() if ".lora_" in name}
        for group in unwrapped(optimizer).param_groups:
            is_lora = set(group["params"]) <= factors
            self._groups.append((group, group["lr"] / self._base, is_lora))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rate of this step, which the schedule resets after it."""
        rate = float(self.rates[state.global_step])
        is_dense = self.option == DENSE
        for group, multiple, is_lora in self._groups:
            if group.get("layer") is None:
                # LoRA+ has another rate for B.
                group["lr"] = (rate * multiple if is_lora else rate) * (is_lora != is_dense)
            elif is_dense:
                group["lr"], group[_RATIOS] = rate, _each(group, 0.0)
            elif is_lora:
                group["lr"], group[_RATIOS] = rate, _each(group, 1.0)
            else:
                # The rates of the LoRA experts are multiples of that of `full`.
                group["lr"], group[_RATIOS] = _HELD, _each(group, rate / _HELD)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Store the loss and the won share of a step, and end the sweep if the loss diverged."""
        if not logs or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        self.passes = float(state.epoch or 0)
        won = {name: share for name, share in logs.items() if name.startswith("won/")}
        if won:
            full = float(won.get("won/full", 0.0))
            self.won.append(full if self.option == DENSE else 1 - full)
        if self._is_above():
            self.diverged = True
            control.should_training_stop = True

    def end_with_infinite_loss(self) -> None:
        """Store that the loss or a weight of the step that was begun became infinite or NaN."""
        self.diverged = True
        if len(self.losses) < len(self.rates):
            self.losses.append(math.inf)

    def _is_above(self) -> bool:
        recent = self.losses[-_RECENT:]
        if not math.isfinite(recent[-1]):
            return True
        first = self.losses[:FIRST]
        if len(self.losses) < FIRST + _RECENT:
            return False
        # The noise of the first losses counts as well: near 0, a quarter of the start is little.
        limit = max(_ABOVE * float(np.mean(first)), float(np.mean(first) + 4 * np.std(first)))
        return float(np.mean(recent)) > limit


def _each(group: dict[str, Any], ratio: float) -> tuple[float, ...]:
    return (ratio,) * len(group[_RATIOS])
