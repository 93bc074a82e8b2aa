"""Evaluations during a training: the loss on a validation part, the best step, early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from molf.checkpoint.random_state import random_state, set_random_state
from molf.data.encoding import EncodedSamples
from molf.job.settings.during import eval_strategy_of
from molf.job.settings.resolved import ResolvedSettings
from molf.job.trainer.best import Best
from molf.job.trainer.ending import Ending
from molf.measure.inference import during_training
from molf.measure.likelihood import sequence_losses
from molf.measure.sharing import split_over
from molf.ranks import ranks

EVAL_LOSS = "eval_loss"
PATIENCE = "early_stopping_patience"


@dataclass(frozen=True)
class Validation:
    """The validation part of a training.

    Attributes:
        samples: The encoded samples.
        pad_id: Any id of the vocabulary.
        batch_size: Samples per forward pass.
    """

    samples: EncodedSamples
    pad_id: int
    batch_size: int

    def loss(self, model: Any) -> float:
        """Return the mean loss per labelled token in nats; NaN if the model's output is.

        Several processes measure a share each, and all return the same. Modes of the model and
        random generators are as before.
        """
        state = random_state()
        try:
            with during_training(), split_over(ranks()):
                losses = sequence_losses(
                    model,
                    self.samples.input_ids,
                    self.samples.labels,
                    pad_id=self.pad_id,
                    batch_size=self.batch_size,
                )
        except FloatingPointError:  # the guard of the steps decides about the training
            return math.nan
        finally:
            set_random_state(state)
        return sum(total for total, _ in losses) / sum(count for _, count in losses)


class EvaluationCallback(TrainerCallback):
    """Has the trainer evaluate the model, and notes the best step.

    The trainer's own strategy "epoch" evaluates after the checkpoint of an epoch's last step, so
    that a training resumed from it would leave the evaluation out. This one evaluates before it.

    Args:
        settings: The run's settings.
        best: Gets the losses.
        ending: Whether the training has no step left.
    """

    def __init__(self, settings: ResolvedSettings, best: Best, ending: Ending) -> None:
        self._strategy = eval_strategy_of(settings)
        self._every = settings.eval_steps
        self._keeps_best = settings.keep_best
        self._best = best
        self._ending = ending

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate if it is due, and at the end; log the step as well."""
        if self._is_due(args, state) or self._ending.is_at(state):
            control.should_evaluate = control.should_log = True

    def _is_due(self, args: TrainingArguments, state: TrainerState) -> bool:
        if self._strategy == "epoch":
            epoch = float(state.epoch or 0.0)
            return epoch.is_integer() and epoch >= args.eval_delay
        assert self._every is not None
        return state.global_step % self._every == 0 and state.global_step >= args.eval_delay

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Note the loss; save a checkpoint of the best step if it shall be kept."""
        if self._best.add(state.global_step, metrics[EVAL_LOSS]) and self._keeps_best:
            control.should_save = True


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, with a count that is in the checkpoints.

    Args:
        settings: The run's settings.
        ending: Gets the reason.
    """

    def __init__(self, settings: ResolvedSettings, ending: Ending) -> None:
        super().__init__(early_stopping_patience=settings.early_stopping_patience)
        self._saves = settings.has_checkpoints
        self._ending = ending

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """Leave out the check of the trainer's own strategy, which is not used."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Count evaluations without a lower loss, and end the training after enough of them."""
        self.check_metric_value(args, state, control, metrics[EVAL_LOSS])
        count = self.early_stopping_patience_counter
        if count < self.early_stopping_patience or self._ending.is_at(state):
            return
        self._ending.end(
            PATIENCE, f"{count} evaluations without a lower loss ({PATIENCE})", control
        )
        control.should_save |= self._saves

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"count": self.early_stopping_patience_counter}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Replace the count."""
        self.early_stopping_patience_counter = state["count"]
