"""Run one trial as an ordinary run of `molf train`, and keep its records."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.disk.room import is_disk_full
from molf.errors import InputError, reason_of
from molf.job.progress import ShowTraining
from molf.job.record.ownership import (
    ADAPTER,
    ASSIGNMENT,
    CHECKPOINTS,
    ENVIRONMENT,
    MODEL,
    read_json,
)
from molf.job.record.result import RunError, RunResult
from molf.job.settings.defaults import ROUTED
from molf.measure.meanings import METRICS_VERSION
from molf.measure.questions import question_scores
from molf.study.assigning.making import (
    AssignmentMaker,
    assignment_columns,
    with_cost,
    write_assignment,
)
from molf.study.definition import CHOOSE, KEEP_RECORDS, Point, Study
from molf.study.identity import settings_key
from molf.study.outcome import (
    TRIALS,
    Results,
    TrialResult,
    outcome_of,
    place_columns,
    result_file,
    run_directory,
    write_result,
)
from molf.study.plan import FAILED, PRUNED, Outcome, Planned
from molf.study.routed_layers import full_weights, moved_parameters, routed_layers
from molf.study.running import (
    FullDiskError,
    QuietReporter,
    alone,
    clear_leftovers,
    parameters_of,
    training_flops,
)
from molf.study.storage import storage_errors

if TYPE_CHECKING:
    from optuna.trial import Trial

    from molf.job.inputs import Inputs
    from molf.job.settings.settings import TrainSettings

_PACKAGES = ("molf", "torch", "transformers", "trl", "peft")


class TrialRunner:
    """Runs trials one after another in this process.

    Args:
        study: The study.
        inputs: Task, base model and its evaluation, kept between trials.
    """

    def __init__(self, study: Study, inputs: Inputs | None) -> None:
        self._study = study
        self._inputs = inputs
        self._results = Results(study)
        self._assign = AssignmentMaker(study, inputs)

    def __call__(self, planned: Planned, point: Point, trial: Trial | None = None) -> Outcome:
        """Run a trial, unless its result is on disk; return its outcome, also of a failure.

        Args:
            planned: The trial.
            point: Its rates.
            trial: The trial of Optuna, for pruning.
        """
        study = self._study
        place = (planned.cell.name, planned.method.name, planned.label(point))
        with alone(study, TRIALS, *place):
            return self._run(planned, point, place, trial)

    def _run(
        self, planned: Planned, point: Point, place: tuple[str, str, str], trial: Trial | None
    ) -> Outcome:
        study = self._study
        file = result_file(study, *place)
        found = self._results.refresh().of(planned, point)
        if found is not None:
            if found.key not in self._results.by_key:
                write_result(file, found)
            return replace(outcome_of(found, planned.cell.metric), is_reused=True)
        started = time.perf_counter()
        directory = run_directory(study, *place)
        try:
            result, is_reused = self._result(planned, point, directory, trial)
            write_result(file, result)
        except _PrunedError:
            return Outcome(PRUNED, None, point, seconds=time.perf_counter() - started)
        except Exception as error:
            if isinstance(error.__cause__, storage_errors()):
                raise error.__cause__ from None  # while the pruner was asked: no failed trial
            if isinstance(error.__cause__, _PrunedError):
                return Outcome(PRUNED, None, point, seconds=time.perf_counter() - started)
            if is_disk_full(error):
                raise FullDiskError(
                    f"The disk of {study.output_dir} is full: {_first_line(error)} Finished "
                    "trials are kept; start again when there is room."
                ) from error
            seconds = time.perf_counter() - started
            return Outcome(FAILED, None, point, seconds=seconds, error=_first_line(error))
        return replace(outcome_of(result, planned.cell.metric), is_reused=is_reused)

    def _result(
        self, planned: Planned, point: Point, directory: Path, trial: Trial | None
    ) -> tuple[TrialResult, bool]:
        """Return the result of a trial, and whether an equal training had it already."""
        settings, cost, trained = planned.at(point), None, ""
        if planned.trial_rule is not None:
            made = self._assign(planned.cell.name, planned.trial_rule, point, planned.seed)
            cost = made.cost
            # Different rules may make one assignment, such as the wins of epd and shape.
            file = directory.with_name(f"{directory.name}-{ASSIGNMENT}")
            trained = settings_key(replace(settings, assignment="made"), made.training)
            known = self._results.trained(planned, point, trained)
            if known is not None:
                return replace(known, row=with_cost(known.row, cost)), True
            write_assignment(file, made.assignment)
            settings = replace(settings, assignment=str(file))
        clear_leftovers(directory)
        try:
            started = time.perf_counter()
            run = self._train(planned, settings, directory, trial)
            row = trial_row(planned, point, run, time.perf_counter() - started)
        finally:
            if self._study.keep == KEEP_RECORDS:
                for part in (MODEL, ADAPTER, CHECKPOINTS):
                    shutil.rmtree(directory / part, ignore_errors=True)
        result = TrialResult(
            planned.key,
            row if cost is None else with_cost(row, cost),
            question_scores(run.after.predictions),
            planned.settings_key(point),
            trained,
        )
        return result, False

    def _train(
        self, planned: Planned, settings: TrainSettings, directory: Path, trial: Trial | None
    ) -> RunResult:
        from molf.job.run import train

        # A trial that was killed is run again; it is short.
        settings = replace(settings, output_dir=directory, overwrite=True, save_minutes=0)
        prunes = trial is not None and self._study.choose.prune and planned.phase == CHOOSE
        reporter = (
            _PruningReporter(trial, -1 if not planned.cell.minimize else 1)
            if trial is not None and prunes
            else QuietReporter()
        )
        return train(settings, reporter, self._inputs)


def trial_row(planned: Planned, point: Point, run: RunResult, seconds: float) -> dict[str, Any]:
    """Return the row of a finished trial: no absolute paths, and the same columns for all."""
    environment = read_json(run.directory / ENVIRONMENT) or {}
    git = environment.get("git") or {}
    parameters = parameters_of(run.directory)
    device = environment.get("device") or {}
    packages = environment.get("packages") or {}
    settings = planned.at(point)
    return {
        **place_columns(planned, point),
        "score": settings.score if settings.method in ROUTED else None,
        **metric_columns("before", run.before.metrics),
        **metric_columns("after", run.after.metrics),
        **{f"won/{name}": round(share, 6) for name, share in run.shares.items()},
        **(assignment_columns(run.directory / ASSIGNMENT) if settings.method == "hybrid" else {}),
        "steps": run.steps,
        "skipped_steps": run.skipped_steps,
        "training_loss": run.training_loss,
        "tokens": run.tokens,
        "parameters": parameters,
        "trained_parameters": run.trained_parameters,
        **_routed_columns(run),
        "training_flops": training_flops(parameters, run.trained_parameters, run.tokens),
        "seconds": round(seconds, 2),
        "training_seconds": round(run.training_seconds, 2),
        "evaluation_seconds": round(run.evaluation_seconds, 2),
        "peak_memory_bytes": run.peak_memory_bytes,
        "started": environment.get("started"),
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "device": f"{device.get('type', '')} {device.get('name', '')}".strip(),
        "cpu_count": environment.get("cpu_count"),
        "torch_threads": environment.get("torch_threads"),
        "python": environment.get("python"),
        **{f"version/{name}": packages.get(name) for name in _PACKAGES},
        "metrics_version": METRICS_VERSION,
    }


def _routed_columns(run: RunResult) -> dict[str, Any]:
    """Return the columns about the routed layers of a run."""
    if not run.shares:
        return {"moved_parameters": run.trained_parameters}
    layers = routed_layers(run)
    if layers is None:
        return {"moved_parameters": None}
    share = full_weights(layers)
    return {
        "moved_parameters": moved_parameters(run.trained_parameters, layers),
        **({} if share is None else {"full_weights": round(share, 6)}),
    }


def metric_columns(prefix: str, metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return value and interval of each metric as columns; None where an end is unknown."""
    columns: dict[str, float | None] = {}
    for name, metric in metrics.items():
        columns[f"{prefix}/{name}"] = _finite(metric.value)
        columns[f"{prefix}/{name}/low"] = _finite(metric.low)
        columns[f"{prefix}/{name}/high"] = _finite(metric.high)
    return columns


def _finite(value: float) -> float | None:
    return float(f"{value:.8g}") if math.isfinite(value) else None


class _PrunedError(RuntimeError):
    """The pruner ended the trial."""


class _PruningReporter(QuietReporter):
    """Reports training losses to the pruner, and ends the training when it asks to.

    Metrics are measured at the end alone, so losses of the same step are compared.

    Args:
        trial: The trial of Optuna.
        sign: -1 if Optuna maximises, as a low loss is good.
    """

    def __init__(self, trial: Trial, sign: int) -> None:
        super().__init__()
        self._trial = trial
        self._sign = sign

    @contextmanager
    def training(self, steps: int) -> Iterator[ShowTraining]:
        """Yield a function of (step, log entry or None) that ends a training by an exception."""

        def show(step: int, logs: Mapping[str, Any] | None) -> None:
            loss = (logs or {}).get("loss")
            if isinstance(loss, float):
                self._trial.report(self._sign * loss, step)
                if step < steps and self._trial.should_prune():
                    raise _PrunedError("ended by the pruner")

        yield show


def _first_line(error: BaseException) -> str:
    kind = "" if isinstance(error, (InputError, RunError)) else f"{type(error).__name__}: "
    return f"{kind}{reason_of(error)}"[:1000]
