"""TRL's SFTTrainer with a method's loss, log figures, guard and checkpoints.

A checkpoint is that of `molf.checkpoint`; the trainer's own hooks keep the order of the data: it
reads its counters from `trainer_state.json` of a checkpoint and skips the batches before them.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTTrainer

from molf.checkpoint.manifest import DamagedError
from molf.checkpoint.random_state import random_state, set_random_state
from molf.checkpoint.states import load_training_state, training_state
from molf.checkpoint.store import read_values
from molf.checkpoint.writer import Snapshot
from molf.core.step.guard import NonFiniteError
from molf.core.storage.sharding import is_sharded
from molf.job.memory import memory_figures
from molf.job.methods import Prepared
from molf.job.model.loading import LoadedModel
from molf.job.model.saving import base_generation_config
from molf.job.record.result import ResumeError
from molf.job.settings.batches import GROUP_BY_LENGTH
from molf.job.trainer.callbacks import Clock, Throughput, fidelity_figures, unwrapped
from molf.job.trainer.checkpoints import Checkpoints
from molf.job.trainer.run_parts import RunParts
from molf.job.trainer.split_data import FilledSampler, WithoutBlankRows, is_blank, order_of
from molf.job.trainer.steps import AllStepsTakenError
from molf.job.trainer.validation import EVAL_LOSS, Validation
from molf.ranks import ranks


class Trainer(SFTTrainer):
    """SFTTrainer with a method's additional loss and log figures.

    The guard checks each loss and clips the gradients.
    """

    def __init__(
        self,
        base: LoadedModel,
        prepared: Prepared,
        parts: RunParts,
        checkpoints: Checkpoints,
        clock: Clock,
        validation: Validation | None = None,
        *,
        is_in_shards: bool = False,
        **kwargs: Any,
    ) -> None:
        self.base = base
        self.prepared = prepared
        self.parts = parts
        self.wins, self.guard = parts.wins, parts.guard
        self.checkpoints = checkpoints
        self.clock = clock
        self.validation = validation
        model = prepared.model
        trained = {p: p.data for p in model.parameters() if p.requires_grad}
        self._is_sharded = is_in_shards
        super().__init__(**kwargs)
        for parameter, data in trained.items():
            # Beside a quantised base, TRL rounds trained parameters to bfloat16, which loses small
            # updates. Restore their type.
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.accelerator.clip_grad_norm_ = self.guard.clip
        if self._is_sharded:
            self.accelerator.prepare_model = partial(_prepare_shards, self.accelerator)
        self._is_blank = False  # whether the micro-batch has blank rows alone
        collate: Any = self.data_collator  # type: ignore[has-type]
        if checkpoints.settings.joins_examples:
            # Set here, because SFTConfig's `packing` would make TRL's trainer pack the rows again.
            collate = dataclasses.replace(collate, padding_free=True)
        self.data_collator = WithoutBlankRows(collate) if ranks().count > 1 else collate
        if ranks().count > 1:
            # TRL's figures: accelerate would leave out some processes' at the end of an epoch.
            self.accelerator.gather_for_metrics = self._gather_real

    def _gather_real(self, number: Tensor) -> Tensor:
        """Return a number of all processes, [count]; 0 for those with blank rows alone."""
        found: Tensor = self.accelerator.gather(number * (not self._is_blank))
        return found

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self._is_sharded:
            super()._move_model_to_device(model, device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the rows; of several processes, with the blank rows."""
        count, data = ranks().count, self.parts.data
        if count == 1 and self.args.train_sampling_strategy != GROUP_BY_LENGTH:
            return super()._get_train_sampler(train_dataset)
        batch = count * self._train_batch_size
        return FilledSampler(
            data.rows,
            1 if count == 1 or self.args.dataloader_drop_last else batch,
            order_of(data, self.args, count),
        )

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # Joined examples have no mask and no padding. transformers would count all tokens but the
        # padding token, which may be the EOS token of each example.
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        super()._track_num_input_tokens({**inputs, "attention_mask": mask * (not self._is_blank)})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer."""
        optimizer = super().create_optimizer(*args, **kwargs)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._is_sharded and not all(map(is_sharded, held)):
            # A library that puts whole weights in their place would train without sharding.
            raise RuntimeError("The trainer's optimizer has parameters that are not in shards.")
        return optimizer

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; if it cannot be written, warn and continue."""
        self.checkpoints.save(self._snapshot, self.state.global_step)

    def _snapshot(self) -> Snapshot:
        """Return the state of the training after a step.

        Raises:
            OSError: The logs up to this step cannot be written.
        """
        self.store_flos()
        model = self.accelerator.unwrap_model(self.model)
        optimizer = training_state(model, unwrapped(self.optimizer))
        values = {
            "optimizer": optimizer.values,
            "scheduler": self.lr_scheduler.state_dict(),
            "random": random_state(),
            "trainer": {
                "clock": self.clock.state_dict(),
                "throughput": self._throughput.state_dict(),
                "checkpoints": self.checkpoints.totals.state_dict(),
                # TRL averages these since the last log entry.
                "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
                "tokens": self._total_train_tokens,
            },
            **self.parts.state_dict(),
        }
        # The log entries are in metrics.jsonl; here they would grow with the training.
        state = dataclasses.replace(self.state, log_history=[])
        return Snapshot(
            step=self.state.global_step,
            tensors=optimizer.tensors,
            values=values,
            texts={TRAINER_STATE_NAME: json.dumps(dataclasses.asdict(state), indent=2) + "\n"},
            write_more=self._write_model if self.checkpoints.settings.keeps_models else None,
        )

    def _write_model(self, directory: Path) -> None:
        """Write the model of a checkpoint in the format of transformers or PEFT."""
        self.save_model(str(directory), _internal_call=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: weights are loaded with the optimizer's state."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load weights, the optimizer's state, and everything else but random generators.

        Raises:
            ResumeError: The frozen weights or the parameters are not those of the run.
        """
        self._checkpoint = checkpoint
        if checkpoint is None:
            return
        values = read_values(Path(checkpoint))
        self._random = values["random"]  # set by `_load_rng_state`, after batches are skipped
        model = self.accelerator.unwrap_model(self.model)
        self.parts.check(values)
        try:
            load_training_state(
                Path(checkpoint), values["optimizer"], model, unwrapped(self.optimizer)
            )
        except (DamagedError, ValueError) as error:
            raise ResumeError(f"The checkpoint {checkpoint} cannot be loaded: {error}.") from error
        self.lr_scheduler.load_state_dict(values["scheduler"])
        own = values["trainer"]
        self.clock.load_state_dict(own["clock"])
        self._throughput.load_state_dict(own["throughput"])
        self.checkpoints.totals.load_state_dict(own["checkpoints"])
        self._metrics["train"].update(own["metrics"])
        self._total_train_tokens = own["tokens"]
        self.parts.load_state_dict(values, self.args.device)

    def load_best(self, step: int) -> bool:
        """Load the weights of an earlier step from its checkpoint; return whether it is there.

        Warns:
            UserWarning: It is missing or damaged; the weights stay those of the last step.
        """
        path = ranks().on_main(lambda: self.checkpoints.whole(step))
        if path is None:
            warnings.warn(
                f"The checkpoint of step {step}, which has the lowest loss, is missing or damaged: "
                "the model of the last step is saved.",
                stacklevel=2,
            )
            return False
        values = read_values(path)
        model = self.accelerator.unwrap_model(self.model)
        load_training_state(path, values["optimizer"], model, unwrapped(self.optimizer))
        self.parts.load_method(values)
        return True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the loss on the validation part, log it, and call the callbacks."""
        assert self.validation is not None
        started = time.perf_counter()
        loss = self.validation.loss(self.accelerator.unwrap_model(self.model))
        seconds = time.perf_counter() - started
        self._throughput.leave_out(seconds)
        metrics = {EVAL_LOSS: loss, "eval_runtime": seconds}
        # Not TRL's `log`, which would add and clear the figures of the training.
        super(SFTTrainer, self).log(dict(metrics))
        del self.state.log_history[:-1]
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the random generators; the trainer calls it after it has skipped batches."""
        if checkpoint is not None and ranks().count == 1:  # several are seeded by `RandomByStep`
            set_random_state(self._random)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model of a checkpoint."""
        model = self.accelerator.unwrap_model(self.model)
        with base_generation_config(model, self.base, Path(output_dir or self.args.output_dir)):
            super()._save(output_dir, state_dict)

    def train(self, *args: Any, **kwargs: Any) -> None:
        """Train; an error of the optimizer names the step and the parameters."""
        self._throughput = Throughput()
        self.clock.start()
        try:
            super().train(*args, **kwargs)
        except NonFiniteError as error:
            raise self.guard.stopped(error, self.state, self.model) from error
        except AllStepsTakenError:
            self._load_rng_state(self._checkpoint)
            self.callback_handler.on_train_end(self.args, self.state, self.control)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run forward and backward pass of a micro-batch, and pass its loss to the guard."""
        self._is_blank = ranks().count > 1 and is_blank(args[1])
        loss = super().training_step(*args, **kwargs)
        self.guard.add_loss(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """Return the loss of a micro-batch, with the method's penalty."""
        loss = super().compute_loss(
            model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if model.training:
            self.guard.check_before_backward(loss)
        if self.prepared.penalty is None or not model.training:
            return loss
        # If TRL divides by the tokens of the whole step, the trainer sums the micro-batches.
        sums = num_items_in_batch is not None
        share = self.current_gradient_accumulation_steps if sums else 1
        return loss + self.prepared.penalty().to(loss.device) / share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the trainer's figures with those of guard, method and routing."""
        if "loss" in logs:
            logs["loss"] = self.guard.take_mean_loss()
            if self.guard.skipped_steps:
                logs["skipped_steps"] = self.guard.skipped_steps
            # The trainer logs only the rate of the first group.
            for name, ratio in self.prepared.rates.items():
                logs[name] = logs["learning_rate"] * ratio
            logs |= self.prepared.measure()
            logs |= fidelity_figures(self.optimizer)
            tokens = int(self.state.num_input_tokens_seen)
            logs["tokens_per_second"] = self._throughput.since_last(tokens)
            logs |= memory_figures(self.args.device)
            logs |= {f"won/{name}": share for name, share in self.wins.take_recent().items()}
            if (margin := self.wins.take_margin()) is not None:
                logs["score_margin"] = margin
        super().log(logs, start_time)
        del self.state.log_history[:-1]  # metrics.jsonl has the entries; here they would grow


def _prepare_shards(accelerator: Any, model: Any, **kwargs: Any) -> Any:
    """Prepare a model in shards for autocast alone.

    fully_shard moves values and sums gradients itself. accelerate would put DDP around the model,
    and move offloaded shards to the device.
    """
    prepare = type(accelerator).prepare_model
    return prepare(accelerator, model, device_placement=False, evaluation_mode=True)
