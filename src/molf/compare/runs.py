"""Read runs for a comparison: their directories, or the rows of a table of runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from molf.data.sources import sources_of
from molf.errors import InputError
from molf.job.record.contents import hash_of_data
from molf.job.record.finished_run import FinishedRun, read_run
from molf.job.record.ownership import ENVIRONMENT, EVALUATION, PREDICTIONS, is_run, read_json
from molf.job.record.results import RESULTS, ForeignTableError, read_results
from molf.measure.meanings import UNRECORDED_VERSION, last_change
from molf.measure.questions import Scores, question_scores
from molf.paths import expanded
from molf.report.run_data import COMPLETE, FAILED, RUNNING, status_of

COSTS = ("trained_parameters", "training_seconds", "peak_memory_bytes")
_ROW_SETTINGS = ("ranks", "alpha", "match", "score", "learning_rate", "lora_learning_rate")
# Options without effect on a result, and those that are compared by themselves.
_NO_SETTINGS = frozenset(
    {
        *("task", "model", "method", "seed", "data", "eval_data", "forgetting_data", "eval_part"),
        *("output_dir", "overwrite", "resume", "dry_run", "fallback_dir", "report_to", "run"),
        *("save_steps", "save_minutes", "save_total_limit", "async_save", "on_save_error"),
        *("dataset_num_proc", "token_cache"),
        *("logging_steps", "kernels", "state_offload", "gradient_checkpointing", "keep_low_halves"),
        *("per_device_eval_batch_size", "max_eval_samples", "few_shot"),
    }
)
_EXACT = ("max_eval_samples", "few_shot")


@dataclass(frozen=True)
class ComparedRun:
    """A complete run.

    Attributes:
        name: Its directory, or its row.
        task: Name of the task.
        model: Directory or Hub id of the base.
        method: The method.
        seed: The seed.
        started: When it was started.
        same: Values by field that runs of a task and model must have in common; a field that is
            not recorded is absent.
        settings: Options of the training as text; those of a row alone are few.
        before: Metrics of the base.
        after: Metrics of the trained model.
        costs: Values by name of `COSTS`; unknown ones are absent.
        place: What time and memory depend on: the device, and the kind of memory.
        made_by: Version of molf; empty if unknown.
        scores: Scores of questions by metric; empty where they are unknown.
        is_row: Whether it is known from its row alone.
    """

    name: str
    task: str
    model: str
    method: str
    seed: int
    started: str
    same: dict[str, Any]
    settings: dict[str, str]
    before: dict[str, float]
    after: dict[str, float]
    costs: dict[str, float]
    place: str = ""
    made_by: str = ""
    scores: Scores = field(default_factory=dict)
    is_row: bool = False


def read_compared(paths: Sequence[Path]) -> tuple[list[ComparedRun], list[str]]:
    """Read directories of runs, or one table of runs.

    Returns:
        The runs, and a notice for each part of them that is missing.

    Raises:
        InputError: A path is no run or no table of runs, a run is not complete, there are fewer
            than two runs, or one is given twice.
    """
    places = [expanded(path) for path in paths]
    tables = [place for place in places if place.is_file()]
    if tables and len(places) > 1:
        raise InputError(
            f"{tables[0]} is given with {len(places) - 1} more. Give directories of runs, or one "
            "table of runs alone."
        )
    notices: list[str] = []
    if tables:
        runs = _read_table(tables[0], notices)
    else:
        resolved = [place.resolve() for place in places]
        twice = [place for place in places if resolved.count(place.resolve()) > 1]
        if twice:
            raise InputError(f"{twice[0]} is given twice.")
        runs = [_read_directory(place, notices) for place in places]
    if len(runs) < 2:
        given = str(places[0]) if places else "none"
        raise InputError(f"A comparison needs at least 2 runs; given: {len(runs)} ({given}).")
    return runs, notices


def _read_directory(path: Path, notices: list[str]) -> ComparedRun:
    _check_complete(path)
    return _of_run(read_run(path), notices, row=_row_beside(path))


def _check_complete(path: Path) -> None:
    if path.is_dir() and not is_run(path):
        if isinstance(record := read_json(path / EVALUATION), dict) and "before" not in record:
            raise InputError(
                f"{path} is an evaluation of molf eval, which has no method and no seed. Give runs "
                "of molf train."
            )
        if (path / RESULTS).is_file():
            raise InputError(f"{path} is not a run. Give its table: {path / RESULTS}")
    run = read_run(path)
    if run.is_probe:
        raise InputError(f"{path} is a probe of molf probe, which has no metrics.")
    status = status_of(run)
    if status == RUNNING:
        raise InputError(f"{path} is still being written: its run has not ended. Wait for its end.")
    if status == FAILED:
        raise InputError(f"{path} is not complete: its run has failed ({path / 'error.log'}).")
    if status != COMPLETE:
        raise InputError(
            f"{path} is not complete: its run has stopped before its end. molf train --output_dir "
            f"{path} --resume continues it."
        )


def _of_run(run: FinishedRun, notices: list[str], row: Mapping[str, str]) -> ComparedRun:
    path, config, recorded = run.path, run.config, run.config["run"]
    evaluation = read_json(path / EVALUATION)
    try:
        before, after = (_metrics(evaluation[when]) for when in ("before", "after"))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path / EVALUATION} cannot be read: it has no metrics.") from error
    task, data = recorded.get("task") or {}, recorded.get("data") or {}
    model, training = recorded.get("model") or {}, recorded.get("training") or {}
    environment = read_json(path / ENVIRONMENT)
    environment = environment if isinstance(environment, dict) else {}
    same = {
        "eval_part": config.get("eval_part"),
        "metrics_version": last_change(
            after, evaluation.get("metrics_version", UNRECORDED_VERSION)
        ),
        "prompt_version": task.get("prompt_version"),
        "data_hash": hash_of_data(data.get("files") or {}, str(task.get("data"))),
        "evaluation_records": task.get("evaluation_records"),
        "base_hash": model.get("contents"),
    }
    costs = {
        "trained_parameters": model.get("trained_parameters"),
        "training_seconds": training.get("seconds", _number(row.get("training_seconds"))),
        "peak_memory_bytes": training.get(
            "peak_memory_bytes", _number(row.get("peak_memory_bytes"))
        ),
    }
    device = environment.get("device") or {}
    packages = environment.get("packages") or {}
    return ComparedRun(
        name=str(path),
        task=str(config.get("task")),
        model=str(config.get("model")),
        method=run.method,
        seed=run.seed,
        started=str(environment.get("started") or ""),
        same={name: value for name, value in same.items() if value not in (None, "")}
        | {name: config.get(name) for name in _EXACT if name in config},
        settings={
            **{name: _plain(value) for name, value in config.items() if name not in _NO_SETTINGS},
            "weights": _weights(config.get("data")),
        },
        before=before,
        after=after,
        costs={
            name: float(value)
            for name, value in costs.items()
            if value and not math.isnan(value)  # neither recorded nor in a row
        },
        place=f"{device.get('name')} ({training.get('peak_memory_of', 'unknown memory')})",
        made_by=str(packages.get("molf") or ""),
        scores=_scores(path, notices),
    )


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a record of `eval.json`; break-downs are left out."""
    return {
        str(name): float(entry["value"])
        for name, entry in record.items()
        if isinstance(entry.get("value"), (int, float))
    }


def _weights(data: Any) -> str:
    """Return the weights of the sources of training data; 1 if all are."""
    found = [source.weight for source in sources_of(str(data))] if data else []
    return ",".join(f"{one:g}" for one in found) if set(found) - {1.0} else "1"


def _scores(path: Path, notices: list[str]) -> Scores:
    entries = []
    try:
        with (path / PREDICTIONS).open(encoding="utf-8") as lines:
            entries = [json.loads(line) for line in lines]
        return question_scores(entries)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        notices.append(
            f"{path / PREDICTIONS} is missing or cannot be read: its run is compared by its seed "
            "alone."
        )
        return {}


def _row_beside(path: Path) -> dict[str, str]:
    """Return the row of a run in the table beside it; empty without one."""
    table = path.resolve().parent / RESULTS
    try:
        _, rows = read_results(table)
    except ForeignTableError:
        return {}
    return next((row for row in rows if _is_row_of(row, path)), {})


def _is_row_of(row: Mapping[str, str], path: Path) -> bool:
    environment = read_json(path / ENVIRONMENT)
    started = environment.get("started") if isinstance(environment, dict) else None
    return row.get("run") == path.resolve().name and row.get("started") == started


def _read_table(path: Path, notices: list[str]) -> list[ComparedRun]:
    try:
        _, rows = read_results(path)
    except ForeignTableError as error:
        raise InputError(f"{path} is no table of molf's runs: {error}.") from error
    runs, alone = [], 0
    for row in rows:
        place = path.parent / (row.get("run") or "-")
        # The directory may be gone, or hold another run by now.
        if is_run(place) and _is_row_of(row, place) and status_of(read_run(place)) == COMPLETE:
            runs.append(_of_run(read_run(place), notices, row))
        else:
            runs.append(_of_row(row, path))
            alone += 1
    if alone:
        notices.append(
            f"{alone} of {len(rows)} runs are known from their row alone, without their directory: "
            "they have no scores of questions, and few of their settings are known."
        )
    return runs


def _of_row(row: Mapping[str, str], path: Path) -> ComparedRun:
    name = f"{path.name}: {row.get('run')}"
    try:
        seed = int(row["seed"])
    except ValueError:
        given = row["seed"]
        raise InputError(f"{path}: run {row.get('run')} has seed {given!r}, no number.") from None
    metrics: dict[str, dict[str, float]] = {"before": {}, "after": {}}
    for column, text in row.items():
        when, _, metric = column.partition("/")
        value = _number(text)
        if when in metrics and metric and not math.isnan(value):
            metrics[when][metric] = value
    known: dict[str, Any] = {
        name: row.get(name) for name in ("eval_part", "data_hash", "base_hash")
    }
    version = _number(row.get("metrics_version"))
    known["metrics_version"] = last_change(
        metrics["after"], UNRECORDED_VERSION if math.isnan(version) else int(version)
    )
    costs = {name: _number(row.get(name)) for name in COSTS}
    return ComparedRun(
        name=name,
        task=row["task"],
        model=row["model"],
        method=row["method"],
        seed=seed,
        started=row["started"],
        same={name: value for name, value in known.items() if value},
        settings={name: _plain(row[name]) for name in _ROW_SETTINGS if row.get(name)},
        before=metrics["before"],
        after=metrics["after"],
        costs={name: value for name, value in costs.items() if value and not math.isnan(value)},
        is_row=True,
    )


def _number(text: Any) -> float:
    try:
        found = float(text)
    except (TypeError, ValueError):
        return math.nan
    return found if math.isfinite(found) else math.nan


def _plain(value: Any) -> str:
    """Return a setting as text, equal for equal values of options and of cells."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(_plain, value))
    if isinstance(value, str) and "," in value:
        return ",".join(map(_plain, value.split(",")))
    if value is None or isinstance(value, bool):
        return str(value)
    number = _number(value)
    return str(value) if math.isnan(number) else f"{number:.10g}"
