"""Train a model with TRL's SFTTrainer and the method's optimizer."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from molf.core.adamw import AdamW
from molf.core.model.quantised import quantisation_of
from molf.job.methods import prepare
from molf.job.model.merging import merge_trained
from molf.job.model.quantised import Precision, load_quantised
from molf.job.model.saving import save_adapter
from molf.job.opening import Opening
from molf.job.progress import Reporter
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import ADAPTER, CHECKPOINTS, METRICS, ROUTING
from molf.job.record.routing_log import RoutingWriter
from molf.job.record.routing_meaning import routing_meaning, routing_shares_text
from molf.job.record.wins import RoutingSummary, Wins
from molf.job.settings.defaults import ADAPTERS
from molf.job.trainer.callbacks import (
    FidelityCallback,
    MetricsCallback,
    RoutingCallback,
    unwrapped,
)
from molf.job.trainer.checkpoints import Checkpoints
from molf.job.trainer.step_guard import StepGuard
from molf.job.trainer.steps import StepsCheck
from molf.job.trainer.trainer import Trainer


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
        meaning: Interpretation of the routing; empty without routing.
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
    meaning: str
    merge: dict[str, Any]

    @property
    def shares_and_meaning(self) -> str:
        """The experts' shares and their interpretation, for a card; empty without routing."""
        if self.routing is None:
            return ""
        return f"{routing_shares_text(self.routing)} {self.meaning}"


def run_training(
    opening: Opening,
    directory: RunDirectory,
    reporter: Reporter,
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Train the opening's model on its samples, in place, and merge its adapter.

    A trained adapter is saved before the merge. `callbacks` are added to the run's own.
    """
    settings, arguments = opening.settings, opening.arguments
    base, data = opening.base, opening.data
    if settings.quantised is not None and quantisation_of(base.model.config) is None:
        reporter.say(f"Loading the base again ({settings.quantised})")
        base.model = None  # free memory for the quantised base
        # Layers that are trained in full are not quantised.
        full = settings.reached_assignment.full if settings.reached_assignment else ()
        base.model = load_quantised(
            settings.model,
            settings.quantised,
            arguments.device,
            dtype=getattr(torch, settings.dtype),
            unquantised=[layer.name for layer in full],
        )
    if settings.method in ADAPTERS:  # takes long for PiSSA and EVA
        reporter.say("Putting in the adapter")
    precision = Precision(base.model, bf16=arguments.bf16)
    started = time.perf_counter()
    prepared = prepare(base.model, settings, data)
    preparation_seconds = time.perf_counter() - started
    wins, guard = Wins(prepared.experts), StepGuard(settings)
    checkpoints = Checkpoints(opening.room)
    # Gradients freed in the backward pass would be logged with a norm of 0.
    without = ("grad_norm",) if settings.optimizer_in_backward else ()
    _warn_of_warmup(data.steps, arguments)
    with (
        RoutingWriter(lambda: directory / ROUTING) as writer,
        reporter.training(data.steps) as show,
    ):
        arguments.output_dir = str(directory / CHECKPOINTS)  # created by the trainer
        trainer = Trainer(
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
    routing, config = wins.summary(), settings.method_config
    return Training(
        model=plain,
        trained_parameters=prepared.trained_parameters,
        steps=output.global_step,
        skipped_steps=guard.skipped_steps,
        seconds=seconds,
        preparation_seconds=preparation_seconds,
        tokens=trainer.state.num_input_tokens_seen,
        loss=guard.mean_loss(),
        routing=routing,
        meaning=routing_meaning(routing, config, output.global_step) if routing and config else "",
        merge=record,
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
