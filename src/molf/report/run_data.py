"""Read a run or an evaluation for its page; a file that cannot be read becomes a notice."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from molf.disk.locks import in_use
from molf.job.record.finished_run import FinishedRun, read_run
from molf.job.record.ownership import (
    ENVIRONMENT,
    ERROR_LOG,
    EVALUATION,
    EXAMPLES,
    METRICS,
    PREDICTIONS,
    SPECTRA,
    is_run,
    predictions_in,
    read_json,
)
from molf.job.record.resumed_run import is_finished
from molf.report.routing_data import RoutingData, read_routing_data
from molf.report.samples import Samples, read_examples, read_samples
from molf.shown import counted
from molf.tasks.preview import PreviewedRecord

COMPLETE, RUNNING, STOPPED, FAILED, EVALUATED = (
    "complete",
    "running",
    "stopped",
    "failed",
    "evaluation",
)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Value:
    """A metric with its 95% interval; ends are NaN where they are unknown."""

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class MetricRow:
    """A metric before and after the training; `before` is None for an evaluation alone."""

    name: str
    before: Value | None
    after: Value | None


@dataclass(frozen=True)
class MetricTable:
    """Metrics of a task, or of a part of its records.

    Attributes:
        title: Name of the task, or of the break-down and its group.
        rows: The metrics.
    """

    title: str
    rows: tuple[MetricRow, ...]


@dataclass(frozen=True)
class Evaluated:
    """The metrics of one task.

    Attributes:
        task: Its name.
        metrics: All records.
        groups: Break-downs by name (`by_subject`), each a table per group.
        notes: Notes of the evaluation.
        has_before: Whether the base was measured.
    """

    task: str
    metrics: MetricTable
    groups: dict[str, tuple[MetricTable, ...]]
    notes: dict[str, Any]
    has_before: bool


@dataclass
class RunData:
    """All that the page of a run shows.

    Attributes:
        path: The directory.
        status: `complete`, `running`, `stopped`, `failed`, or `evaluation`.
        run: Its settings; None for an evaluation.
        environment: Versions, device, command; empty if missing.
        log: Figures of `metrics.jsonl` by name, NaN where a line lacks them; `step` from 1.
        evaluations: The same of its lines on evaluations during the training.
        evaluated: Metrics by task.
        samples: Predictions; None without any.
        examples: Examples of the training; empty for runs of earlier versions.
        routing: The routing; None without any.
        spectra: Content of `spectra.json`; empty without it.
        notices: One line for each part that is missing or cannot be read.
        error: The last line of `error.log`.
        label: Its name on a page with several runs; empty for that of the directory.
        written: When the files were read.
    """

    path: Path
    status: str
    run: FinishedRun | None
    environment: dict[str, Any] = field(default_factory=dict)
    log: dict[str, Floats] = field(default_factory=dict)
    evaluations: dict[str, Floats] = field(default_factory=dict)
    evaluated: tuple[Evaluated, ...] = ()
    samples: Samples | None = None
    examples: tuple[PreviewedRecord, ...] = ()
    routing: RoutingData | None = None
    spectra: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    error: str = ""
    label: str = ""
    written: datetime = field(default_factory=lambda: datetime.now().astimezone())

    @property
    def name(self) -> str:
        """Its label, or else the name of the directory."""
        return self.label or self.path.resolve().name

    @property
    def steps(self) -> int:
        """Planned steps of the training; 0 if they are not recorded."""
        training = self.recorded.get("training")
        return int(training.get("steps") or 0) if isinstance(training, dict) else 0

    @property
    def last_step(self) -> int:
        """The last logged step; 0 without a log."""
        found = self.log.get("step")
        return int(found[-1]) if found is not None and len(found) else 0

    @property
    def recorded(self) -> dict[str, Any]:
        """The record under `run:` of its settings."""
        return dict(self.run.config["run"]) if self.run is not None else {}

    @property
    def options(self) -> dict[str, Any]:
        """The options of the training."""
        config = {} if self.run is None else self.run.config
        return {name: value for name, value in config.items() if name != "run"}


def read_run_data(path: Path, *, most_bins: int = 400) -> RunData:
    """Read a run of `molf train`, or an evaluation of `molf eval`.

    Args:
        path: The directory.
        most_bins: Bins of time of the routing.

    Raises:
        InputError: The directory is neither.
    """
    if not is_run(path) and _is_evaluation(path):
        data = RunData(path, EVALUATED, None)
        _add_evaluations(data)
        return data
    run = read_run(path)
    data = RunData(run.path, status_of(run), run)
    _add_environment(data)
    _add_log(data)
    _add_evaluations(data)
    _add_spectra(data)
    data.examples, notices = read_examples(run.path / EXAMPLES)
    data.notices += notices
    data.routing, notices = read_routing_data(run, most_bins=most_bins)
    data.notices += notices
    if data.status == RUNNING:
        data.notices.append("The run has not ended: the page shows its files up to now.")
    if data.status == STOPPED:
        data.notices.append(
            "The run has stopped before its end. molf train --output_dir RUN --resume continues it."
        )
    return data


def _is_evaluation(path: Path) -> bool:
    record = read_json(path / EVALUATION)
    return isinstance(record, dict) and ("tasks" in record or "metrics" in record)


def status_of(run: FinishedRun) -> str:
    """Return whether a run is complete, running, stopped or failed."""
    if is_finished(run.path) or (run.is_probe and "routing" in run.config["run"]):
        return COMPLETE
    if in_use(run.path, by_writers=True):
        return RUNNING
    return FAILED if (run.path / ERROR_LOG).is_file() else STOPPED


def _add_environment(data: RunData) -> None:
    found = read_json(data.path / ENVIRONMENT)
    if not isinstance(found, dict):
        data.notices.append(f"{ENVIRONMENT} is missing or cannot be read.")
    else:
        data.environment = found
        packages = found.get("packages")
        made_by = packages.get("molf") if isinstance(packages, dict) else None
        if made_by != (own := version("molf")):
            data.notices.append(
                f"The run was made by molf {made_by or 'of an unknown version'}, the page by molf "
                f"{own}: unknown entries are left out."
            )
    log = data.path / ERROR_LOG
    if data.status == FAILED:
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        data.error = lines[-1][:500] if lines else ""


def _add_log(data: RunData) -> None:
    """Read `metrics.jsonl`; lines that are no objects with a step are counted."""
    path, rows, damaged = data.path / METRICS, [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        data.notices.append(f"{METRICS} is missing or cannot be read.")
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and _is_number(entry.get("step")):
            rows.append(entry)
        else:
            damaged += 1
    if damaged:
        data.notices.append(f"{METRICS}: {counted(damaged, 'line')} cannot be read.")
    data.log = _columns([row for row in rows if "eval_loss" not in row])
    data.evaluations = _columns([row for row in rows if "eval_loss" in row])


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Floats]:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return {
        name: np.array([_number(row.get(name)) for row in rows], dtype=np.float64) for name in names
    }


def _add_spectra(data: RunData) -> None:
    if not (data.path / SPECTRA).is_file():
        return
    found = read_json(data.path / SPECTRA)
    layers = found.get("layers") if isinstance(found, dict) else None
    numbers = ("base_norm", "change_norm", "effective_rank", "intruders")
    is_whole = isinstance(layers, list) and all(
        isinstance(one, dict) and "name" in one and all(_is_number(one.get(x)) for x in numbers)
        for one in layers
    )
    if not is_whole:
        data.notices.append(f"{SPECTRA} cannot be read.")
        return
    data.spectra = found


def _add_evaluations(data: RunData) -> None:
    path = data.path / EVALUATION
    if not path.is_file():
        if data.status == COMPLETE and not (data.run and data.run.is_probe):
            data.notices.append(f"{EVALUATION} is missing.")
        return
    record = read_json(path)
    entries = record.get("tasks", [record]) if isinstance(record, dict) else None
    try:
        data.evaluated = tuple(_evaluated(entry) for entry in entries or [None])
    except (AttributeError, KeyError, TypeError, ValueError):
        data.notices.append(f"{EVALUATION} cannot be read.")
        return
    files = [data.path / PREDICTIONS] if data.run is not None else predictions_in(data.path)
    data.samples, notices = read_samples(files)
    data.notices += notices


def _evaluated(entry: Mapping[str, Any]) -> Evaluated:
    """Return the metrics of a record of `eval.json`.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: It has another form.
    """
    has_before = "before" in entry
    before = entry["before"] if has_before else {}
    after = entry["after"] if has_before else entry["metrics"]
    groups = {}
    for name in {**before, **after}:
        one, other = before.get(name, {}), after.get(name, {})
        if "value" not in {**one, **other}:  # a break-down by group
            groups[name] = tuple(
                MetricTable(str(group), _rows(one.get(group, {}), other.get(group, {})))
                for group in {**one, **other}
            )
    return Evaluated(
        task=str(entry["task"]),
        metrics=MetricTable(str(entry["task"]), _rows(before, after)),
        groups=groups,
        notes=dict(entry.get("notes") or {}),
        has_before=has_before,
    )


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[MetricRow, ...]:
    return tuple(
        MetricRow(str(name), _value(before.get(name)), _value(after.get(name)))
        for name in {**before, **after}
        if "value" in {**before.get(name, {}), **after.get(name, {})}
    )


def _value(entry: Mapping[str, Any] | None) -> Value | None:
    if entry is None or not _is_number(entry.get("value")):
        return None
    low, high = (_number(entry.get(end)) for end in ("low", "high"))
    return Value(float(entry["value"]), low, high, int(entry.get("count") or 0))


def _number(value: Any) -> float:
    """Return a number; NaN for everything else."""
    return float(value) if _is_number(value) else math.nan


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
