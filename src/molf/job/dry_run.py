"""Two real steps of a run, in a directory that is thrown away: does it work, what will it take?"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.disk.files import scratch_directory
from molf.job.inputs import Inputs
from molf.job.methods import TrainingData
from molf.job.model.room_needed import Needed
from molf.job.opening import Opening, open_training
from molf.job.progress import Reporter
from molf.job.record.directory import RunDirectory
from molf.job.settings.batches import GROUP_BY_LENGTH
from molf.job.settings.during import BY_LOSS
from molf.job.settings.planned import planned_attention, warn_of_unplanned, workload_of
from molf.job.settings.resolved import ResolvedSettings
from molf.job.trainer.sft_config import sft_config
from molf.job.trainer.split_data import LengthGroups
from molf.job.training import run_training
from molf.planning.measure import PeakBytes, held_tensors
from molf.planning.memory import MemoryPlan, Planner
from molf.planning.quantised_base import planned_as
from molf.planning.workload import why_not_planned
from molf.tasks import Task

STEPS = 2
_ADALORA_STEPS = 3  # its schedule has three phases
_SAMPLES = 1000


@dataclass(frozen=True)
class DryRun:
    """What two steps showed.

    Attributes:
        examples: Examples of the task's training data.
        tokenized: How many of them were tokenized, drawn by the seed.
        left_out: How many of these are longer than the limit.
        packed_rows: Rows that the tokenized ones are packed into; None without packing.
        batch_size: Rows per forward pass: examples, or packed ones.
        length: Tokens of the longest row; the steps were taken with the longest. Of joined rows,
            the mean of a forward pass.
        joined: Whether the rows of a forward pass are joined to one.
        planned: The planned peak in bytes; None for a method that cannot be planned.
        measured: The measured peak in bytes.
        measured_of: The measured memory, such as that of the process.
        planned_at_limit: The planned peak with examples as long as allowed, in bytes, or None.
        limit: The longest example allowed, in tokens.
        seconds: How long the second step took.
        steps: Optimizer steps of the whole run.
        estimated_seconds: How long they will take, judged by the lengths of the examples.
    """

    examples: int
    tokenized: int
    left_out: int
    packed_rows: int | None
    batch_size: int
    length: int
    joined: bool
    planned: int | None
    measured: int
    measured_of: str
    planned_at_limit: int | None
    limit: int
    seconds: float
    steps: int
    estimated_seconds: float


def rehearse(settings: ResolvedSettings, task: Task, reporter: Reporter, inputs: Inputs) -> DryRun:
    """Do all that a run does up to its first two steps; nothing is left on disk.

    Evaluations are left out. The steps are taken with the longest examples, and with the optimizer
    state that the first of them makes.

    Raises:
        InputError: As the run would.
    """
    samples = task.training_samples
    drawn = random.Random(settings.seed).sample(samples, min(len(samples), _SAMPLES))
    opening = open_training(settings, task, inputs, reporter, drawn)
    for note in opening.notes:
        reporter.say(note)
    settings, data = opening.settings, opening.data
    encoded = data.samples
    short_steps = _ADALORA_STEPS if settings.method == "adalora" else STEPS
    batch = _actual_batch(settings, opening.rows)
    longest = _longest(data, short_steps, batch)
    length = _length(longest, batch)
    with scratch_directory("dry-run") as scratch:
        short = replace(
            batch,
            output_dir=scratch / "run",
            max_steps=short_steps,
            max_time=None,
            eval_strategy="no",
            eval_steps=None,
            validation_data=None,
            keep_best=False,
            early_stopping_patience=None,
            lr_scheduler_type=_without_evaluations(batch.lr_scheduler_type),
            warmup_ratio=0.0,
            save_steps=None,
            save_minutes=0.0,
            save_total_limit=None,
            logging_steps=1,
            report_to=("none",),
            train_sampling_strategy="sequential",
        )
        arguments = sft_config(short)
        planned, at_limit = _planned(opening, longest, batch, arguments)
        watch = _Watch(arguments.device)
        try:
            with RunDirectory(short.output_dir, overwrite=False) as directory:
                rehearsed = replace(
                    opening,
                    settings=short,
                    arguments=arguments,
                    data=longest,
                    room=Needed(),  # no checkpoints are written
                )
                run_training(rehearsed, directory, reporter, callbacks=[watch])
        finally:
            watch.stop()
    on_cuda = arguments.device.type == "cuda"
    return DryRun(
        examples=len(samples),
        tokenized=len(drawn),
        left_out=encoded.left_out,
        packed_rows=None if data.packed is None else data.rows,
        batch_size=batch.per_device_train_batch_size,
        length=length,
        joined=settings.joins_examples,
        planned=planned,
        measured=watch.peak.bytes,
        measured_of="max_memory_allocated" if on_cuda else "live tensors, by torch's profiler",
        planned_at_limit=at_limit,
        limit=settings.max_length,
        seconds=watch.seconds,
        steps=opening.steps,
        estimated_seconds=watch.seconds * opening.steps * _share_of_tokens(data, length, batch),
    )


def _without_evaluations(schedule: str) -> str:
    """Return the schedule, or a constant one for those that follow evaluations."""
    return "constant" if schedule in BY_LOSS else schedule


class _Watch(TrainerCallback):
    """Measures the peak of the whole training, and the time of its last step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0
        self.seconds = 0.0
        self.peak = PeakBytes(device)
        self._is_measuring = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """The model is on its device, and there is no gradient and no state yet."""
        self.peak = PeakBytes(self._device, held_tensors(model))
        self.peak.__enter__()
        self._is_measuring = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._wait()
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock; the last step's time stays."""
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring."""
        self.stop()

    def stop(self) -> None:
        """Stop measuring, if that has begun; a profiler left on crashes the process at its end."""
        if self._is_measuring:
            self._is_measuring = False
            self.peak.__exit__(None, None, None)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _actual_batch(settings: ResolvedSettings, rows: int) -> ResolvedSettings:
    """The settings with a batch that the training will see: none has more than all rows."""
    size = min(settings.per_device_train_batch_size, rows)
    batches = -(-rows // size)
    return replace(
        settings,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=min(settings.gradient_accumulation_steps, batches),
    )


def _longest(data: TrainingData, steps: int, settings: ResolvedSettings) -> TrainingData:
    """The longest rows, enough for a batch, again and again in every forward pass."""
    size, lengths = settings.per_device_train_batch_size, data.row_lengths()
    order = sorted(range(data.rows), key=lambda row: lengths[row], reverse=True)
    batch = [order[i % len(order)] for i in range(size)]
    rows = batch * settings.gradient_accumulation_steps * steps
    if data.packed is not None:
        return TrainingData(data.samples, steps, [data.packed[row] for row in rows])
    encoded = data.samples
    samples = replace(
        encoded,
        input_ids=[encoded.input_ids[row] for row in rows],
        labels=[encoded.labels[row] for row in rows],
        kept=[encoded.kept[row] for row in rows],
    )
    return TrainingData(samples, steps)


def _length(longest: TrainingData, settings: ResolvedSettings) -> int:
    """Tokens of the longest row, which the others are padded to; of joined rows, the mean."""
    size, lengths = settings.per_device_train_batch_size, longest.row_lengths()
    return -(-sum(lengths[:size]) // size) if settings.joins_examples else max(lengths)


def _planned(
    opening: Opening,
    longest: TrainingData,
    settings: ResolvedSettings,
    arguments: Any,
) -> tuple[int | None, int | None]:
    """The planned peaks: of the steps that are taken, and of those with the longest allowed."""
    if why_not_planned(settings.method, settings.kernels) is not None:
        return None, None
    if opening.quantisation is not None and planned_as(opening.quantisation) is None:
        return None, None
    workload = workload_of(
        settings,
        length=_length(longest, settings),
        padded=len(set(longest.row_lengths())) > 1,
        device="cuda" if arguments.device.type == "cuda" else "cpu",
        quantised=planned_as(opening.quantisation),
    )
    at_limit = replace(
        workload, length=settings.max_length, padded=settings.per_device_train_batch_size > 1
    )
    config = copy.deepcopy(opening.base.config)
    planned_attention(config, settings)
    warn_of_unplanned(settings)
    planner = Planner(config)
    plans: list[MemoryPlan] = [planner.memory(planned) for planned in (workload, at_limit)]
    return plans[0].peak, plans[1].peak


def _share_of_tokens(data: TrainingData, longest: int, settings: ResolvedSettings) -> float:
    """Tokens of a batch as they are drawn, padding included, over those of the longest batch."""
    size, lengths = settings.per_device_train_batch_size, data.row_lengths()
    if settings.train_sampling_strategy == GROUP_BY_LENGTH:
        groups = LengthGroups(lengths, size * settings.gradient_accumulation_steps, settings.seed)
        lengths = [lengths[row] for row in groups]
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    if settings.joins_examples:
        drawn = sum(lengths) / len(batches)
    else:
        drawn = sum(max(batch) * size for batch in batches) / len(batches)
    return drawn / (size * longest)
