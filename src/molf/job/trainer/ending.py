"""End a training before its planned steps, with a complete model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.amounts import duration
from molf.job.trainer.callbacks import Clock
from molf.ranks import ranks

MAX_TIME = "max_time"


class Ending:
    """The reason why a training ends before its planned steps.

    Attributes:
        option: The option that ended it; empty if none has.
        reason: The same in words.
    """

    def __init__(self) -> None:
        self.option = ""
        self.reason = ""

    def end(self, option: str, reason: str, control: TrainerControl) -> None:
        """End the training after this step, which is logged and saved as the last one."""
        self.option, self.reason = option, reason
        control.should_training_stop = True

    def is_at(self, state: TrainerState) -> bool:
        """Return whether the training has no step left."""
        return state.global_step >= state.max_steps or bool(self.option)

    def state_dict(self) -> dict[str, str]:
        """Return option and reason."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Replace them."""
        vars(self).update(state)


class TimeLimit(TrainerCallback):
    """Ends a training whose steps have taken a time.

    Args:
        seconds: Time of the steps of all parts; None for no limit.
        clock: Measures it.
        ending: Gets the reason.
    """

    def __init__(self, seconds: float | None, clock: Clock, ending: Ending) -> None:
        self._seconds = seconds
        self._clock = clock
        self._ending = ending

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let a resumed training with a later limit continue."""
        if self._ending.option == MAX_TIME and not self._is_over():
            self._ending.load_state_dict({"option": "", "reason": ""})

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """End the training if the time is over."""
        if self._seconds is None or state.global_step >= state.max_steps:
            return
        if self._is_over():
            reason = f"max_time of {duration(self._seconds)} is over"
            self._ending.end(MAX_TIME, reason, control)

    def _is_over(self) -> bool:
        if self._seconds is None:
            return False
        # One process decides for all, because clocks differ.
        over = ranks().is_main and self._clock.seconds() >= self._seconds
        return bool(ranks().largest([int(over)])[0])
