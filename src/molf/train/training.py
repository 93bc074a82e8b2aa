"""The training itself: TRL's SFTTrainer with our optimizer in its factory slot."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from molf.train.callbacks import MetricsCallback, RoutingCallback, Throughput
from molf.train.defaults import ADAPTERS
from molf.train.methods import Prepared, TrainingData, prepare
from molf.train.model_loading import LoadedModel
from molf.train.model_saving import save_adapter
from molf.train.progress import Reporter
from molf.train.resolved import ResolvedSettings
from molf.train.routing_log import RoutingWriter
from molf.train.run_directory import ADAPTER, CHECKPOINTS, METRICS, ROUTING, RunDirectory
from molf.train.wins import Wins


@dataclass
class Training:
    """What a training did.

    Attributes:
        model: The trained plain model, adapters merged.
        trained_parameters: How many numbers were trained.
        steps: Optimizer steps taken.
        seconds: Time they took.
        preparation_seconds: Time before them, such as that of a decomposition.
        tokens: Tokens seen, padding left out.
        loss: Mean training loss.
        shares: Share of layers that each expert won; empty without routing.
    """

    model: Any
    trained_parameters: int
    steps: int
    seconds: float
    preparation_seconds: float
    tokens: int
    loss: float
    shares: dict[str, float]


def run_training(
    base: LoadedModel,
    data: TrainingData,
    settings: ResolvedSettings,
    arguments: SFTConfig,
    directory: RunDirectory,
    reporter: Reporter,
) -> Training:
    """Train `base.model` on the samples; the model is changed in place.

    A trained adapter is saved before it is merged.
    """
    if settings.method in ADAPTERS:  # for PiSSA and EVA this may take its time
        reporter.say("Putting in the adapter")
    started = time.perf_counter()
    prepared = prepare(base.model, settings, data)
    preparation_seconds = time.perf_counter() - started
    wins = Wins(prepared.experts)
    _warn_of_warmup(data.steps, arguments)
    with (
        RoutingWriter(directory / ROUTING) as writer,
        reporter.training(data.steps) as show,
    ):
        trainer = _Trainer(
            model=prepared.model,
            args=arguments,
            train_dataset=Dataset.from_dict(
                {"input_ids": data.samples.input_ids, "labels": data.samples.labels}
            ),
            processing_class=copy.deepcopy(base.tokenizer),  # the trainer changes its padding
            optimizer_cls_and_kwargs=prepared.optimizer,
            callbacks=[
                RoutingCallback(prepared, writer, wins),
                MetricsCallback(directory / METRICS, show),
                *prepared.callbacks,
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.wins = wins
        trainer.prepared = prepared
        started = time.perf_counter()
        output = trainer.train()
        seconds = time.perf_counter() - started
    checkpoints = directory / CHECKPOINTS
    if not any(checkpoints.iterdir()):
        checkpoints.rmdir()  # the trainer makes it in any case
    model = trainer.accelerator.unwrap_model(trainer.model)
    if prepared.save_adapter is not None:
        save_adapter(prepared.save_adapter, model, settings, directory / ADAPTER)
    return Training(
        model=prepared.finish(model),
        trained_parameters=prepared.trained_parameters,
        steps=output.global_step,
        seconds=seconds,
        preparation_seconds=preparation_seconds,
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
    """SFTTrainer with a method's own term of the loss and figures in the log, for trackers too."""

    wins: Wins
    prepared: Prepared

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._throughput = Throughput()
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        loss = super().compute_loss(
            model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if self.prepared.penalty is None or not model.training:
            return loss
        # Where TRL divides by the tokens of the whole step, the trainer only sums.
        sums = num_items_in_batch is not None
        share = self.current_gradient_accumulation_steps if sums else 1
        return loss + self.prepared.penalty().to(loss.device) / share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # The trainer logs the rate of its first group alone.
            for name, ratio in self.prepared.rates.items():
                logs[name] = logs["learning_rate"] * ratio
            logs |= self.prepared.measure()
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
