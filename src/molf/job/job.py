"""A training run in order: load, measure, train, save, reload, measure, write the records."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import torch
from trl import SFTConfig

from molf.core.model.quantised import Quantisation
from molf.disk.files import write_json, write_jsonl, write_text, write_yaml
from molf.errors import InputError
from molf.job.memory import peak_memory, reset_peak_memory
from molf.job.methods import Plan, TrainingData, plan
from molf.job.model.card import model_card
from molf.job.model.loading import LoadedModel, load_model, move
from molf.job.model.room_needed import Needed
from molf.job.model.saved_tensors import Stored, Storing, default_dtype
from molf.job.model.saving import Fallback, SaveError, save_model
from molf.job.model.saving_check import check_saving, storing_of
from molf.job.opening import open_training
from molf.job.progress import Reporter
from molf.job.record.directory import RunDirectory
from molf.job.record.environment import environment
from molf.job.record.ownership import (
    CONFIG,
    ENVIRONMENT,
    EVALUATION,
    LOW_HALVES,
    MODEL,
    PREDICTIONS,
)
from molf.job.record.provenance import file_records
from molf.job.record.result import RunError, RunResult, evaluation_record, results_row
from molf.job.record.results import append_result
from molf.job.record.routing_meaning import routing_meaning, routing_shares_text
from molf.job.record.tracebacks import write_traceback
from molf.job.settings.defaults import ADAPTERS, MERGE_BASES
from molf.job.settings.resolved import ResolvedSettings
from molf.job.steps import count_steps
from molf.job.training import Training, run_training
from molf.measure import Evaluation, EvaluationSettings, evaluate
from molf.tasks import Task


def run_job(
    settings: ResolvedSettings,
    task: Task,
    forgetting_text: str,
    reporter: Reporter,
    started: datetime,
) -> RunResult:
    """Run a training, after its settings, task and output directory were checked.

    Raises:
        InputError: The model cannot be used, or the settings do not fit it. Nothing was written.
        RunError: The run failed; its directory holds the files written so far and the traceback.
    """
    opening = open_training(settings, task.training_samples)
    settings, arguments = opening.settings, opening.arguments
    base, encoded = opening.base, opening.encoded
    data = TrainingData(encoded, count_steps(arguments, len(encoded.input_ids)))
    planned = plan(base.model, settings, data)
    room = check_saving(base, settings, planned, data.steps, task.evaluation_count)
    storing = storing_of(base, settings)
    parameters = base.model.num_parameters()
    for note in opening.notes:
        reporter.say(note)
    settings = replace(
        settings,
        bf16=arguments.bf16,
        merge_base=_merge_base(settings, opening.quantisation),
        max_length=opening.max_length,
        save_dtype=settings.save_dtype or _name(default_dtype(base)),
    )
    # A task may have a default address of its data.
    sources = {"data": task.description().get("data"), "eval_data": settings.eval_data}
    files = file_records({**sources, "forgetting_data": settings.forgetting_data})
    directory = RunDirectory(settings.output_dir, overwrite=settings.overwrite)
    job = _Job(
        settings,
        task,
        forgetting_text,
        reporter,
        arguments,
        base,
        storing,
        parameters,
        data,
        planned,
        opening.quantisation,
        directory,
        files,
        environment(arguments.device, started),
        room,
    )
    with directory:
        try:
            job.write_config()
            result = job.run()
            directory.complete()
        except _UnusableDataError as error:
            directory.discard()
            raise InputError(str(error)) from error
        except KeyboardInterrupt:
            where = f"what was written is in {directory.path}.{directory.kept()}"
            reporter.say(f"Interrupted; {where}")
            raise
        except Exception as error:
            cause = str(error).strip().split("\n")[0] or type(error).__name__
            log = write_traceback(directory)
            raise RunError(f"{cause} {log}{_trained(directory)}{directory.kept()}") from error
    return replace(result, results=_add_row(result, settings, started))


def _add_row(result: RunResult, settings: ResolvedSettings, started: datetime) -> Path | None:
    """Add the run to the table of results; return the table's path, or None on failure."""
    folder = result.directory.parent
    try:
        return append_result(folder, results_row(result, settings, started))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"The run is complete, but its row was not added to a table in {folder}: {error}",
            stacklevel=3,
        )
        return None


class _UnusableDataError(Exception):
    """The base model cannot be measured on the data. Raised before training."""


@dataclass
class _Job:
    """The data that the steps of a run share."""

    settings: ResolvedSettings
    task: Task
    forgetting_text: str
    reporter: Reporter
    arguments: SFTConfig
    base: LoadedModel
    storing: Storing
    parameters: int
    data: TrainingData
    plan: Plan
    quantisation: Quantisation | None
    directory: RunDirectory
    files: dict[str, list[dict[str, Any]]]
    environment: dict[str, Any]
    room: Needed

    def write_config(
        self, training: Training | None = None, saved: Mapping[str, Any] | None = None
    ) -> None:
        """Write the settings, the environment, and a record of the run.

        Args:
            training: The result of the training, after it.
            saved: The record of the saved model, after saving.
        """
        samples = self.data.samples
        record = {
            "task": self.task.description(),
            "data": {
                "examples": len(samples.input_ids),
                "left_out_too_long": samples.left_out,
                "longest_tokens": samples.longest,
                "doubtful": dict(samples.faults),
                "files": self.files,
            },
            "model": {
                "parameters": self.parameters,
                "dtype": _name(self.base.dtype),
                **({"quantised": str(self.quantisation)} if self.quantisation else {}),
                "not_reached": list(self.settings.unreached),
                "carried_tensors": len(self.base.unused_tensors.names),
                "stored_dtype": _name(self.base.stored.main_dtype or self.base.dtype),
                **self.plan.record(),
            },
            "training": {"steps": self.data.steps},
        }
        if training is not None:
            record["training"] = {
                "steps": training.steps,
                "skipped_steps": training.skipped_steps,
            }
            if training.routing is not None:
                record["routing"] = {
                    **training.routing.record(),
                    "meaning": self._meaning(training),
                }
            if training.merge:
                record["merge"] = training.merge
        if saved is not None:
            record["saved"] = dict(saved)
        # The file can be used as a recipe, which must not replace this run.
        options = replace(self.settings, overwrite=False).as_options()
        write_yaml(self.directory / CONFIG, {**options, "run": record})
        write_json(self.directory / ENVIRONMENT, self.environment)

    def _meaning(self, training: Training) -> str:
        """Return the interpretation of the routing; empty without routing."""
        config = self.settings.method_config
        if training.routing is None or config is None:
            return ""
        return routing_meaning(training.routing, config, training.steps)

    def run(self) -> RunResult:
        """Measure the base, train, save, measure the saved model, and write the records."""
        device = self.arguments.device
        reset_peak_memory(device)
        left_out = self.data.samples.left_out
        if left_out:
            self.reporter.say(
                f"Left out: {left_out} of {len(self.task.training_samples)} examples "
                f"are longer than {self.settings.max_length} tokens."
            )
        try:
            before, before_seconds = self._evaluate(self.base, "Evaluating the base model")
        except InputError as error:  # for example, all records are too long
            raise _UnusableDataError(str(error)) from error
        training = run_training(
            self.base,
            self.data,
            self.settings,
            self.arguments,
            self.directory,
            self.reporter,
            self.room,
        )
        # EVA chooses its ranks, and so the number of parameters, from the data.
        if training.trained_parameters != self.plan.trained_parameters:
            self.plan = replace(self.plan, trained_parameters=training.trained_parameters)
        meaning = routed = self._meaning(training)
        if training.routing is not None:
            routed = f"{routing_shares_text(training.routing)} {meaning}"
        description = self.task.description()
        card = model_card(self.settings, description, before, after=None, routing=routed)
        try:
            # Saved first: if another file fails to be written, the training is not lost.
            stored = save_model(
                training.model,
                self.base,
                self.storing,
                card,
                self.directory / MODEL,
                start_dtype=self._start_dtype(),
                halves_path=self.directory / LOW_HALVES,
                fallback=Fallback.of(self.settings, self.directory.path),
            )
        except SaveError:
            with suppress(OSError):
                self.write_config(training)
            raise
        saved_record = self._saved_record(stored)
        self.write_config(training, saved_record)

        training.model = self.base.model = None  # free memory for the saved model
        del stored
        gc.collect()
        model_path = self.directory / MODEL
        if not model_path.is_dir():
            raise FileNotFoundError(
                f"the saved model was deleted before it was measured: {model_path}"
            )
        saved = load_model(str(model_path), getattr(torch, self.settings.dtype))
        after, after_seconds = self._evaluate(saved, "Evaluating the saved model")

        card = model_card(
            self.settings, description, before, after, routing=routed, saved=saved_record
        )
        model_path = self.directory / MODEL
        if model_path.is_dir():
            write_text(model_path / "README.md", card)
        else:  # the directory was deleted during the evaluation
            save_model(saved.model, self.base, self.storing, card, model_path)
        self.write_config(training, saved_record)
        write_jsonl(self.directory / PREDICTIONS, after.predictions)
        write_json(
            self.directory / EVALUATION,
            {
                "task": self.task.name,
                "before": evaluation_record(before),
                "after": evaluation_record(after),
                "notes": {"before": before.notes, "after": after.notes},
            },
        )
        memory, memory_of = peak_memory(device)
        return RunResult(
            directory=self.directory.path,
            before=before,
            after=after,
            steps=training.steps,
            skipped_steps=training.skipped_steps,
            training_loss=training.loss,
            trained_parameters=training.trained_parameters,
            lora_parameters=self.plan.details.get("lora_parameters"),
            tokens=training.tokens,
            preparation_seconds=training.preparation_seconds,
            training_seconds=training.seconds,
            evaluation_seconds=before_seconds + after_seconds,
            peak_memory_bytes=memory,
            peak_memory_of=memory_of,
            shares=training.routing.won if training.routing else {},
            routing=meaning,
            saved=saved_record,
            kernels=None if self.settings.method in ADAPTERS else self.settings.kernels,
        )

    def _start_dtype(self) -> torch.dtype | None:
        """Return the type of the base in training; None if the trained base was dequantised."""
        if self.settings.merge_base == "dequantised":
            return None  # the trained base differs from the stored one
        return cast(torch.dtype, getattr(torch, self.settings.dtype))

    def _saved_record(self, stored: Stored) -> dict[str, Any]:
        """Return the record of the saved model: type, rounding, and lost updates."""
        record: dict[str, Any] = {
            "dtype": self.settings.save_dtype,
            "rounding": self.storing.rounding.kind,
        }
        if stored.low_halves:
            record["low_halves_bytes"] = sum(half.nbytes for half in stored.low_halves.values())
        return {**record, **(stored.update.record() if stored.update is not None else {})}

    def _evaluate(self, loaded: LoadedModel, title: str) -> tuple[Evaluation, float]:
        """Measure a model in the run's type; return the evaluation and its seconds."""
        move(loaded.model, self.arguments.device)
        settings = EvaluationSettings(
            batch_size=self.settings.per_device_eval_batch_size,
            max_length=self.settings.max_length,
            seed=self.settings.seed,
            split_special_tokens=self.settings.split_special_tokens,
        )
        started = time.perf_counter()
        with self.reporter.evaluating(title) as show:
            evaluation = evaluate(
                loaded.model, loaded.tokenizer, self.task, self.forgetting_text, settings, show
            )
        return evaluation, time.perf_counter() - started


def _merge_base(settings: ResolvedSettings, quantisation: Quantisation | None) -> str | None:
    """Return the base that the adapter is merged into; None if the base is not quantised."""
    return None if quantisation is None else settings.merge_base or MERGE_BASES[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trained(directory: RunDirectory) -> str:
    """Return a sentence with the path of the trained model, if it was saved before the failure."""
    model = directory / MODEL
    return f" The trained model is whole in {model}." if (model / "config.json").is_file() else ""
