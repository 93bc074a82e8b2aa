"""Write the records of a run: settings, environment, evaluation, and its row of the table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from molf.disk.files import write_json, write_jsonl, write_text, write_yaml
from molf.job.model.saved_tensors import dtype_name
from molf.job.opening import Opening
from molf.job.record.contents import (
    ASSIGNED,
    hash_of_assignment,
    hash_of_data,
    hash_of_model,
)
from molf.job.record.directory import RunDirectory
from molf.job.record.environment import environment
from molf.job.record.ownership import (
    ASSIGNMENT,
    CONFIG,
    ENVIRONMENT,
    EVALUATION,
    EXAMPLES,
    PREDICTIONS,
)
from molf.job.record.provenance import file_records
from molf.job.record.result import RunResult, evaluation_record, results_row
from molf.job.record.results import append_result
from molf.job.record.resumed_run import ASKED, PROCESSES, UNMASKED, masked_options
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import ResolvedSettings
from molf.job.trainer.result import Training
from molf.measure import Evaluation
from molf.measure.meanings import METRICS_VERSION
from molf.ranks import ranks
from molf.tasks import Task
from molf.tasks.preview import examples_of_run

EARLIER = "earlier_parts"
"""Key in `environment.json`: the environments of the parts before the last resume."""


def input_files(settings: ResolvedSettings, task: Task) -> dict[str, list[dict[str, Any]]]:
    """Return names, sizes and hashes of a run's data files, by option."""
    # A task may have a default address of its data.
    names = ("eval_data", "validation_data", "forgetting_data")
    sources = {name: getattr(settings, name) for name in names}
    return file_records({"data": task.description().get("data"), **sources})


class ConfigRecord:
    """Settings, environment and a few examples of a run; written again when more is known.

    Args:
        opening: The run's settings, model and data, before the training.
        task: The task with its records.
        files: The result of `input_files`.
        started: Start of the run.
        earlier: `environment.json` of the part that is resumed; None for a new run.
    """

    def __init__(
        self,
        opening: Opening,
        task: Task,
        files: Mapping[str, list[dict[str, Any]]],
        started: datetime,
        earlier: Mapping[str, Any] | None = None,
    ) -> None:
        settings, base, samples = opening.settings, opening.base, opening.data.samples
        quantisation = opening.quantisation
        contents = hash_of_model(settings.model)
        self._identity = {
            "metrics_version": METRICS_VERSION,
            "data_hash": hash_of_data(files, str(task.description().get("data"))),
            "base_hash": contents,
        }
        self._assignment = assignment = settings.reached_assignment
        # The file can be used as a recipe, which must not replace or continue this run.
        self._options = replace(settings, overwrite=False, resume=False).as_options()
        unmasked = masked_options(self._options)
        found = examples_of_run(base.tokenizer, task.training_samples, samples.kept)
        self._examples = [example.record() for example in found]
        self._environment = environment(opening.arguments.device, started)
        if earlier is not None:
            before = {name: value for name, value in earlier.items() if name != EARLIER}
            self._environment[EARLIER] = [*(earlier.get(EARLIER) or ()), before]
            self._warn_of_changes(before)
        self._run: dict[str, Any] = {
            "task": task.description(),
            "data": {
                "examples": len(samples.input_ids),
                **({} if opening.data.packed is None else {"packed_rows": opening.data.rows}),
                "left_out_too_long": samples.left_out,
                "longest_tokens": samples.longest,
                "doubtful": dict(samples.faults),
                "files": files,
            },
            "model": {
                "parameters": base.model.num_parameters(),
                "dtype": dtype_name(base.dtype),
                **({"quantised": str(quantisation)} if quantisation else {}),
                "not_reached": list(settings.unreached),
                "carried_tensors": len(base.unused_tensors.names),
                "stored_dtype": dtype_name(base.stored.main_dtype or base.dtype),
                **({"contents": contents} if contents else {}),
                **({ASSIGNED: hash_of_assignment(assignment)} if assignment else {}),
                **opening.plan.record(),
            },
            "training": {"steps": opening.data.steps},
            **({PROCESSES: ranks().count} if ranks().count > 1 else {}),
            **({ASKED: opening.asked} if opening.asked else {}),
            **({UNMASKED: unmasked} if unmasked else {}),
        }

    def _warn_of_changes(self, before: Mapping[str, Any]) -> None:
        """Warn if the resumed part runs with other versions or on another device."""
        packages = {**(before.get("packages") or {}), "python": before.get("python")}
        now = {**self._environment["packages"], "python": self._environment["python"]}
        changes = [
            f"{x} {packages[x]} to {now.get(x)}" for x in packages if packages[x] != now.get(x)
        ]
        devices = [(one.get("device") or {}).get("name") for one in (before, self._environment)]
        if devices[0] != devices[1]:
            changes.append(f"device {devices[0]} to {devices[1]}")
        if changes:
            warnings.warn(
                f"Changed since the run was started: {', '.join(changes)}. The result may differ "
                "from that of an uninterrupted run in the last bits.",
                stacklevel=3,
            )

    @property
    def identity(self) -> dict[str, Any]:
        """What runs have in common that can be compared, for their rows of the table."""
        return dict(self._identity)

    def add_probe(self) -> None:
        """Mark the run as a probe, which keeps no model; nothing is written."""
        self._run["probe"] = True

    def add_training(self, training: Training) -> None:
        """Add the result of the training; nothing is written."""
        # EVA chooses its ranks, and so the number of parameters, from the data.
        self._run["model"]["trained_parameters"] = training.trained_parameters
        self._run["training"] = {
            "steps": training.steps,
            "skipped_steps": training.skipped_steps,
        }
        if training.validation:
            self._run["training"]["validation"] = dict(training.validation)
        if training.ended_by:
            ended = {"ended_by": training.ended_by, "planned_steps": training.planned_steps}
            self._run["training"] |= ended
        if checkpoints := training.checkpoints.record(training.seconds):
            self._run["checkpoints"] = checkpoints
        if training.routing is not None:
            self._run["routing"] = {**training.routing.record(), "meaning": training.meaning}
        if training.merge:
            self._run["merge"] = training.merge

    def add_costs(self, seconds: float, memory: tuple[int, str]) -> None:
        """Add time and memory; nothing is written.

        Args:
            seconds: Time of the training's steps.
            memory: The result of `peak_memory`.
        """
        peak, peak_of = memory
        self._run["training"] |= {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak,
            "peak_memory_of": peak_of,
        }

    def add_saved(self, saved: Mapping[str, Any]) -> None:
        """Add the record of the saved model; nothing is written."""
        self._run["saved"] = dict(saved)

    def write(self, directory: RunDirectory) -> None:
        """Write the files, and the assignment of method hybrid; the examples once."""
        write_yaml(directory / CONFIG, {**self._options, "run": self._run})
        if self._assignment is not None:
            write_text(directory / ASSIGNMENT, self._assignment.to_yaml())
        write_json(directory / ENVIRONMENT, self._environment)
        if not (directory / EXAMPLES).is_file():
            write_jsonl(directory / EXAMPLES, self._examples)


def write_evaluations(
    directory: RunDirectory, task: Task, before: Evaluation, after: Evaluation
) -> None:
    """Write the predictions of the saved model, and the metrics of both."""
    write_jsonl(directory / PREDICTIONS, after.predictions)
    write_json(
        directory / EVALUATION,
        {
            "task": task.name,
            "metrics_version": METRICS_VERSION,
            "before": evaluation_record(before),
            "after": evaluation_record(after),
            "notes": {"before": before.notes, "after": after.notes},
        },
    )


def add_row(
    result: RunResult,
    settings: ResolvedSettings,
    started: datetime,
    identity: Mapping[str, Any],
) -> Path | None:
    """Add the run to the table of results; return the table's path, or None on failure."""
    folder = result.directory.parent
    try:
        return append_result(folder, results_row(result, settings, started, identity))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"The run is complete, but its row was not added to a table in {folder}: {error}",
            stacklevel=3,
        )
        return None


def run_result(
    opening: Opening,
    directory: RunDirectory,
    training: Training,
    before: Evaluation,
    after: Evaluation,
    saved: Mapping[str, Any],
    evaluation_seconds: float,
    memory: tuple[int, str],
) -> RunResult:
    """Return the result of a finished run, without its table.

    Args:
        opening: The run's settings and plan.
        directory: The run's directory.
        training: The result of the training.
        before: Metrics of the base model.
        after: Metrics of the saved model.
        saved: The record of the saved model.
        evaluation_seconds: Time of both evaluations.
        memory: The result of `peak_memory`.
    """
    settings = opening.settings
    peak, peak_of = memory
    return RunResult(
        directory=directory.path,
        before=before,
        after=after,
        steps=training.steps,
        skipped_steps=training.skipped_steps,
        training_loss=training.loss,
        trained_parameters=training.trained_parameters,
        lora_parameters=opening.plan.details.get("lora_parameters"),
        tokens=training.tokens,
        preparation_seconds=training.preparation_seconds,
        training_seconds=training.seconds,
        evaluation_seconds=evaluation_seconds,
        peak_memory_bytes=peak,
        peak_memory_of=peak_of,
        shares=training.routing.won if training.routing else {},
        routing=training.meaning,
        saved=dict(saved),
        kernels=None if settings.method in ADAPTERS else settings.kernels,
        checkpoints=training.checkpoints.record(training.seconds),
    )
