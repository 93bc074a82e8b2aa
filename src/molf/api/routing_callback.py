"""The routing log of any trainer that takes callbacks of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.errors import InputError
from molf.job.record.ownership import ROUTING
from molf.job.record.routing_log import RoutingWriter
from molf.job.record.wins import Wins


class RoutingCallback(TrainerCallback):
    """Writes the decisions of each step to `PATH/routing`, as `molf train` does.

    For `Trainer` of transformers and every trainer of TRL (SFT, DPO, KTO, GRPO, RLOO, reward) with
    `molf.trainer_optimizer`. Of several processes, the first writes. The log is flushed at each
    checkpoint of the trainer and at the end. A training that the trainer resumes continues the log
    at its step.

    Args:
        path: The directory, usually the trainer's `output_dir`; made if it is missing.

    Raises:
        InputError: At the beginning of a training: the directory has a routing log already. In the
            first step: the trainer's optimizer does not route.

    Example:
        >>> trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer,
        ...     callbacks=[molf.RoutingCallback(args.output_dir)])
        >>> trainer.optimizer_cls_and_kwargs = molf.trainer_optimizer(config, lr=5e-6)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._place = Path(path)
        self._writer = RoutingWriter(self._place / ROUTING)
        self._wins: Wins | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Share of the decisions that each expert has won; empty before the first step.

        The decisions are those of this object: a resumed training counts its own part.
        """
        return {} if self._wins is None else self._wins.shares()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Continue the log of a resumed training."""
        if not state.is_world_process_zero:
            return
        self._place.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0 and any((self._place / ROUTING).glob("part-*.parquet")):
            raise InputError(
                f"{self._place} has the routing log of another training. Give another directory, "
                f"or delete {self._place / ROUTING}."
            )
        self._writer.cut(state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Log the completed step; one that was skipped has no decisions."""
        # accelerate's GradScaler skips a step without the optimizer, which still has the decisions
        # of the step before.
        was_skipped = getattr(optimizer, "step_was_skipped", False)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        if not hasattr(optimizer, "routing"):
            raise InputError(
                f"RoutingCallback: the trainer's optimizer is {type(optimizer).__name__}, which "
                "does not route. Set trainer.optimizer_cls_and_kwargs = "
                "molf.trainer_optimizer(config, lr=...) before train()."
            )
        routing = optimizer.routing
        if was_skipped or not routing or not state.is_world_process_zero:
            return
        if self._wins is None:
            self._wins = Wins(next(iter(routing.values())).scores)
        self._writer.add(state.global_step, routing)
        self._wins.add(routing, state.global_step + 1)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the steps before a checkpoint.

        Raises:
            OSError: They cannot be written, and stay pending.
        """
        self._writer.state_dict()

    on_train_end = on_save
