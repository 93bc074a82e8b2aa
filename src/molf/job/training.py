"""Train a model with TRL's SFTTrainer and the method's optimizer."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_model as save_tensors
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from molf.core.adamw import AdamW
from molf.core.model.quantised import quantisation_of
from molf.core.step.guard import NonFiniteError
from molf.job.callbacks import (
    FidelityCallback,
    MetricsCallback,
    RoutingCallback,
    Throughput,
    fidelity_figures,
    unwrapped,
)
from molf.job.methods import Prepared, TrainingData, prepare
from molf.job.model.loading import LoadedModel
from molf.job.model.merging import merge_trained
from molf.job.model.quantised import Precision, load_quantised
from molf.job.model.room_needed import Needed
from molf.job.model.saving import base_generation_config, save_adapter
from molf.job.progress import Reporter
from molf.job.record.checkpoints import Checkpoints
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import ADAPTER, CHECKPOINTS, METRICS, ROUTING
from molf.job.record.routing_log import RoutingWriter
from molf.job.record.wins import RoutingSummary, Wins
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import ResolvedSettings
from molf.job.step_guard import StepGuard
from molf.job.steps import StepsCheck

ALL_WEIGHTS = "model.safetensors"


@dataclass
class Training:
    """The result of a training.

    Attributes:
        model: The trained plain model, with adapters merged.
        trained_parameters: Number of trained parameters.
        steps: Optimizer steps, including skipped ones.
        skipped_steps: Steps skipped because of a loss or gradient that was not finite.
        seconds: Time of the steps.
        preparation_seconds: Time before the steps, such as that of a decomposition.
        tokens: Tokens seen, without padding.
        loss: Mean training loss of the steps that were not skipped.
        routing: Summary of the routing; None without routing.
        merge: Record of the merge; empty if nothing was merged.
    """

    model: Any
    trained_parameters: int
    steps: int
    skipped_steps: int
    seconds: float
    preparation_seconds: float
    tokens: int
    loss: float
    routing: RoutingSummary | None
    merge: dict[str, Any]


def run_training(
    base: LoadedModel,
    data: TrainingData,
    settings: ResolvedSettings,
    arguments: SFTConfig,
    directory: RunDirectory,
    reporter: Reporter,
    room: Needed = Needed(),  # noqa: B008 (frozen)
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Train `base.model` on the samples, in place, and merge its adapter.

    A trained adapter is saved before the merge. `callbacks` are added to the run's own. `room` is
    the disk space that checkpoints leave free for the trained model.
    """
    if settings.quantised is not None and quantisation_of(base.model.config) is None:
        reporter.say(f"Loading the base again ({settings.quantised})")
        base.model = None  # free memory for the quantised base
        base.model = load_quantised(settings.model, settings.quantised, arguments.device)
    if settings.method in ADAPTERS:  # takes long for PiSSA and EVA
        reporter.say("Putting in the adapter")
    precision = Precision(base.model, bf16=arguments.bf16)
    started = time.perf_counter()
    prepared = prepare(base.model, settings, data)
    preparation_seconds = time.perf_counter() - started
    wins, guard = Wins(prepared.experts), StepGuard(settings)
    checkpoints = Checkpoints(room)
    # Gradients freed in the backward pass would be logged with a norm of 0.
    without = ("grad_norm",) if settings.optimizer_in_backward else ()
    _warn_of_warmup(data.steps, arguments)
    with (
        RoutingWriter(lambda: directory / ROUTING) as writer,
        reporter.training(data.steps) as show,
    ):
        arguments.output_dir = str(directory / CHECKPOINTS)  # created by the trainer
        trainer = _Trainer(
            base,
            prepared,
            wins,
            guard,
            checkpoints,
            directory,
            model=prepared.model,
            args=arguments,
            train_dataset=Dataset.from_dict(
                {"input_ids": data.samples.input_ids, "labels": data.samples.labels}
            ),
            processing_class=copy.deepcopy(base.tokenizer),  # the trainer changes its padding
            optimizer_cls_and_kwargs=prepared.optimizer,
            callbacks=[
                StepsCheck(data.steps),
                guard,
                RoutingCallback(prepared, writer, wins),
                FidelityCallback(),
                MetricsCallback(lambda: directory / METRICS, show, without),
                *prepared.callbacks,
                *callbacks,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        output = trainer.train()
        seconds = time.perf_counter() - started
    guard.check_weights(trainer.model, trainer.state)
    checkpoints.warn_of_missing()
    with suppress(OSError):  # the trainer always creates it; fails if it has checkpoints
        (directory / CHECKPOINTS).rmdir()
    # Remove the trainer's autocast, which would affect the measurement of the merge.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    precision.restore()
    restore_float32(trainer.optimizer)
    if settings.state_offload and isinstance(model, PeftModel):
        model.to(arguments.device)  # the merge needs base and adapter on one device
    if prepared.save_adapter is not None:
        save_adapter(prepared.save_adapter, model, settings, directory / ADAPTER)
    plain, record = merge_trained(model, settings, data, reporter)
    return Training(
        model=plain,
        trained_parameters=prepared.trained_parameters,
        steps=output.global_step,
        skipped_steps=guard.skipped_steps,
        seconds=seconds,
        preparation_seconds=preparation_seconds,
        tokens=trainer.state.num_input_tokens_seen,
        loss=guard.mean_loss(),
        routing=wins.summary(),
        merge=record,
    )


def _trains_more_than_its_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config") and any(
        parameter.requires_grad and ".lora_" not in name
        for name, parameter in model.named_parameters()
    )


def restore_float32(optimizer: Any) -> None:
    """Convert bfloat16 weights with low halves in the optimizer to exact float32."""
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, AdamW):
        optimizer.restore_float32()


def _warn_of_warmup(steps: int, arguments: SFTConfig) -> None:
    """Warn if the warm-up takes all steps."""
    # It starts at rate 0 and its share is rounded up: a run of one step would not train at all.
    if arguments.lr_scheduler_type != "constant" and arguments.get_warmup_steps(steps) >= steps:
        warnings.warn(
            f"The warm-up takes all {steps} steps and starts at learning rate 0. Give "
            "--warmup_ratio 0 to train at the full rate from the start.",
            stacklevel=2,
        )


class _Trainer(SFTTrainer):
    """SFTTrainer with a method's additional loss and log figures.

    The guard checks each loss and clips the gradients.
    """

    def __init__(
        self,
        base: LoadedModel,
        prepared: Prepared,
        wins: Wins,
        guard: StepGuard,
        checkpoints: Checkpoints,
        directory: RunDirectory,
        **kwargs: Any,
    ) -> None:
        self.base = base
        self.prepared = prepared
        self.wins = wins
        self.guard = guard
        self.checkpoints = checkpoints
        self.directory = directory
        model = prepared.model
        trained = {p: p.data for p in model.parameters() if p.requires_grad}
        super().__init__(**kwargs)
        for parameter, data in trained.items():
            # Beside a quantised base, TRL rounds trained parameters to bfloat16, which loses small
            # updates. Restore their type.
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
        self.accelerator.clip_grad_norm_ = guard.clip

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create the optimizer, without its warning about checkpoints, which `_save` resolves."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* trained parameters are outside the adap")
            return super().create_optimizer(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; if it cannot be written, warn and continue."""
        place = self.directory / CHECKPOINTS  # the run may have been moved
        self.args.output_dir = str(place)
        step = self.state.global_step
        save = super()._save_checkpoint
        directory = place / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self.checkpoints.save(lambda: save(*args, **kwargs), directory, step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model of a checkpoint.

        PEFT saves the adapter alone. If more is trained, all weights are saved as well, with the
        names of the model with its adapter.
        """
        model = self.accelerator.unwrap_model(self.model)
        with base_generation_config(model, self.base, Path(output_dir or self.args.output_dir)):
            super()._save(output_dir, state_dict)
        if self.args.should_save and _trains_more_than_its_adapter(model):
            save_tensors(model, str(Path(output_dir or self.args.output_dir) / ALL_WEIGHTS))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._throughput = Throughput()
        try:
            return super().train(*args, **kwargs)
        except NonFiniteError as error:
            raise self.guard.stopped(error, self.state, self.model) from error

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.guard.add_loss(loss)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
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
            logs |= {f"won/{name}": share for name, share in self.wins.take_recent().items()}
        super().log(logs, start_time)
