"""The training itself: TRL's SFTTrainer with our optimizer in its factory slot."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from molf.tasks.encoding import EncodedSamples
from molf.train.callbacks import MetricsCallback, RoutingCallback, Throughput
from molf.train.methods import finished, prepare
from molf.train.model_loading import LoadedModel
from molf.train.progress import Reporter
from molf.train.resolved import ResolvedSettings
from molf.train.routing_log import RoutingWriter
from molf.train.run_directory import CHECKPOINTS, METRICS, ROUTING, RunDirectory
from molf.train.wins import Wins


@dataclass
class Training:
    """What a training did.

    Attributes:
        model: The trained plain model, adapters merged.
        steps: Optimizer steps taken.
        seconds: Time they took.
        tokens: Tokens seen, padding left out.
        loss: Mean training loss.
        shares: Share of layers that each expert won; empty without routing.
    """

    model: Any
    steps: int
    seconds: float
    tokens: int
    loss: float
    shares: dict[str, float]


def run_training(
    base: LoadedModel,
    encoded: EncodedSamples,
    settings: ResolvedSettings,
    arguments: SFTConfig,
    directory: RunDirectory,
    reporter: Reporter,
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Train `base.model` on the encoded samples; the model is changed in place.

    `callbacks` are told of everything, as well as the run's own.
    """
    prepared = prepare(base.model, settings)
    routes = settings.method == "molf"
    wins = Wins(settings.method_config.experts if routes and settings.method_config else ())
    steps = total_steps(len(encoded.input_ids), settings)
    _warn_of_warmup(steps, arguments)
    with (
        RoutingWriter(directory / ROUTING) as writer,
        reporter.training(steps) as show,
    ):
        trainer = _Trainer(
            model=prepared.model,
            args=arguments,
            train_dataset=Dataset.from_dict(
                {"input_ids": encoded.input_ids, "labels": encoded.labels}
            ),
            processing_class=copy.deepcopy(base.tokenizer),  # the trainer changes its padding
            optimizer_cls_and_kwargs=prepared.optimizer,
            callbacks=[
                RoutingCallback(prepared, writer, wins),
                MetricsCallback(directory / METRICS, show),
                *callbacks,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.wins = wins
        if routes:
            trainer.lora_lr_ratio = settings.lora_learning_rate / settings.learning_rate
        started = time.perf_counter()
        output = trainer.train()
        seconds = time.perf_counter() - started
    checkpoints = directory / CHECKPOINTS
    if not any(checkpoints.iterdir()):
        checkpoints.rmdir()  # the trainer makes it in any case
    return Training(
        model=finished(trainer.accelerator.unwrap_model(trainer.model)),
        steps=output.global_step,
        seconds=seconds,
        tokens=trainer.state.num_input_tokens_seen,
        loss=output.training_loss,
        shares=wins.shares(),
    )


def _warn_of_warmup(steps: int, arguments: SFTConfig) -> None:
    """Warn where nothing can move: warm-up starts at rate 0, and its share is rounded up."""
    if arguments.lr_scheduler_type != "constant" and arguments.get_warmup_steps(steps) >= steps:
        warnings.warn(
            f"The warm-up takes all {steps} steps and starts at learning rate 0. Give "
            "--warmup_ratio 0 to train at the full rate from the start.",
            stacklevel=2,
        )


class _Trainer(SFTTrainer):
    """SFTTrainer whose log entries, also those of trackers, carry what is ours to tell."""

    wins: Wins
    lora_lr_ratio: float | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._throughput = Throughput()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # The trainer logs the rate of its first group alone.
            if self.lora_lr_ratio is not None:
                logs["lora_learning_rate"] = logs["learning_rate"] * self.lora_lr_ratio
            tokens = int(self.state.num_input_tokens_seen)
            logs["tokens_per_second"] = self._throughput.since_last(tokens)
            logs |= {f"won/{name}": share for name, share in self.wins.take_recent().items()}
        super().log(logs, start_time)


def total_steps(samples: int, settings: ResolvedSettings) -> int:
    """Optimizer steps of the whole run, counted as the trainer counts them."""
    if settings.max_steps is not None:
        return settings.max_steps
    batches = -(-samples // settings.per_device_train_batch_size)
    per_epoch = -(-batches // settings.gradient_accumulation_steps)
    return max(1, int(-(-settings.num_train_epochs * per_epoch // 1)))
