"""The stored form of a study: CSV files and an outline, which tables and figures are made from.

Rows have a stable order and no absolute paths, so that the files can be committed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molf.data.sources import OPTIONS as SOURCES
from molf.data.sources import sources_of
from molf.disk.files import replacing_file, write_json
from molf.disk.room import check_writable, nearest_existing
from molf.errors import InputError
from molf.study.definition import LEARNING_RATE, LORA_RATE, PHASES, Study, rate_columns
from molf.study.outcome import TrialResult
from molf.study.place import definition_of
from molf.study.plan import COMPLETE, Outcome, Plan, Planned

OUTLINE, TRIALS, QUESTIONS = "study.json", "trials.csv", "questions"
REPORT_FILE, SUMMARY, PAGE = WRITTEN = ("report.md", "summary.csv", "report.html")
SETTINGS, TRAINED = "settings_key", "trained_key"  # `TrialResult.settings`, `TrialResult.trained`
_FIRST = (
    *("cell", "method", "phase", "point", "seed", "state", "error", "learning_rate"),
    *("lora_lr_ratio", "lora_learning_rate", "score"),
)
_LAST = (
    *("steps", "skipped_steps", "training_loss", "tokens", "parameters", "trained_parameters"),
    *("moved_parameters", "training_flops", "seconds", "training_seconds", "evaluation_seconds"),
    *("peak_memory_bytes", "started", "commit", "dirty", "device", "cpu_count", "torch_threads"),
    *("python", "metrics_version", SETTINGS, TRAINED, "key"),
)
_ADDED = ("state", "error", SETTINGS, TRAINED)  # to the row of a finished trial
_MATRIX = ("method", "phase", "point", "seed", "metric")

Row = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """A study as it was stored.

    Attributes:
        outline: The planned cells, methods and phases.
        rows: One per trial, in the order of cells, methods, phases, points and seeds.
        questions: By cell, and by (method, phase, point, seed): by metric and question successes
            and attempts.
    """

    outline: dict[str, Any]
    rows: list[Row]
    questions: dict[str, dict[tuple[str, str, int, int], dict[str, dict[str, tuple[float, float]]]]]


def outline_of(study: Study) -> dict[str, Any]:
    """Return the parts of a study file that a report needs."""
    definition = definition_of(study)
    for cell in study.cells:
        entry = definition["cells"][cell.name]
        entry["about"] = cell.about
        entry["points"] = {method.name: study.points(cell, method) for method in study.methods}
    for method in study.methods:
        definition["methods"][method.name]["about"] = method.about
    named: dict[str, Any] = _without_folders(
        {"study": study.name, "about": study.about, **definition}
    )
    return named


def total_of(rows: Iterable[Row], column: str, probe: str) -> float:
    """Return the sum of a column; a training or a probe that several rows share counts once.

    Args:
        rows: Rows of a stored study.
        column: Its name.
        probe: The column of the probe's part in it.
    """
    trainings: dict[tuple[Any, ...], float] = {}
    probes: dict[tuple[Any, ...], float] = {}
    for row in rows:
        part = row.get(probe, 0.0)
        place = tuple(row[name] for name in ("cell", "phase", "seed"))
        own = (*place, row["method"], row["point"])  # of a failed trial
        run = (row["started"], row.get("training_seconds")) if "started" in row else own
        trainings[run] = row.get(column, 0.0) - part
        # Probes of different methods at equal rates differ in their measured time alone.
        rates = (row.get(name) for name in (LEARNING_RATE, LORA_RATE, "probe_seconds"))
        probes[*place, *rates] = part
    return sum(trainings.values()) + sum(probes.values())


def check_folder(folder: Path, name: str) -> None:
    """Check that the stored form of a study may be written to a folder.

    Raises:
        InputError: The folder has that of another study, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file. Give a folder.")
    try:
        stored = json.loads((folder / OUTLINE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if isinstance(stored, dict) and "format" in stored:  # the record of a study, not an outline
        raise InputError(f"{folder} is the directory of a study. Give another folder.")
    if isinstance(stored, dict) and stored.get("study") not in (None, name):
        raise InputError(f"{folder} has the report of the study {stored['study']!r}. Give another.")
    if stored is None:
        for name in (TRIALS, *WRITTEN):
            if (folder / name).exists():
                raise InputError(f"{folder} has a {name} of another origin. Give another folder.")
    check_writable(nearest_existing(folder), str(folder))


def _without_folders(value: Any, option: str = "") -> Any:
    """Return a JSON value of an option with absolute paths shortened to their last part."""
    if isinstance(value, dict):
        return {name: _without_folders(entry, name) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_folders(entry, option) for entry in value]
    if not isinstance(value, str):
        return value
    if option in SOURCES:
        return ",".join(str(replace(one, place=_named(one.place))) for one in sources_of(value))
    return _named(value)


def _named(text: str) -> str:
    return Path(text).name if os.path.isabs(text) else text


def write_records(
    folder: Path,
    study: Study,
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    results: Mapping[str, TrialResult],
) -> None:
    """Write the stored form of a study: its outline, its rows, and the scores of questions.

    Args:
        folder: Where to write; it is created.
        study: The study.
        plan: Its trials.
        outcomes: Ended trials by key, failed ones too.
        results: Finished trials by key.
    """
    (folder / QUESTIONS).mkdir(parents=True, exist_ok=True)
    write_json(folder / OUTLINE, outline_of(study))
    cells = {cell.name: number for number, cell in enumerate(study.cells)}
    methods = {method.name: number for number, method in enumerate(study.methods)}

    def order(trial: Planned) -> tuple[int, int, int, int, int]:
        return (
            cells[trial.cell.name],
            methods[trial.method.name],
            PHASES.index(trial.phase),
            trial.index,
            trial.seed,
        )

    trials = sorted((t for t in plan.trials if t.key in outcomes), key=order)
    rows = [_row(trial, outcomes[trial.key], results.get(trial.key)) for trial in trials]
    _write_csv(folder / TRIALS, _columns(rows), rows)
    for cell in study.cells:
        found = [(t, results[t.key]) for t in trials if t.cell == cell and t.key in results]
        indices = sorted(
            {i for _, result in found for scores in result.questions.values() for i in scores},
            key=int,
        )
        matrix = [
            {
                **dict(
                    zip(
                        _MATRIX,
                        (trial.method.name, trial.phase, trial.index, trial.seed, metric),
                        strict=True,
                    )
                ),
                **{index: _score_text(score) for index, score in scores.items()},
            }
            for trial, result in found
            for metric, scores in sorted(result.questions.items())
        ]
        if matrix:
            _write_csv(folder / QUESTIONS / f"{cell.name}.csv", [*_MATRIX, *indices], matrix)


def _row(trial: Planned, outcome: Outcome, result: TrialResult | None) -> Row:
    row: Row = {
        "cell": trial.cell.name,
        "method": trial.method.name,
        "phase": trial.phase,
        "point": trial.index,
        "seed": trial.seed,
        "state": outcome.state,
        "error": re.sub(r"(?<![\w.])/[^\s:;,'\"]*/", "", outcome.error),  # folders of this machine
        **rate_columns(outcome.point or trial.point or {}),
        "seconds": round(outcome.seconds, 2),
        "key": trial.key,
    }
    if result is not None:
        keys = {SETTINGS: result.settings, TRAINED: result.trained}
        row |= {name: value for name, value in result.row.items() if value is not None}
        row |= {name: value for name, value in keys.items() if value}
        # The study file may have got a further rate since the trial ended.
        row["point"] = trial.index
    return row


def _columns(rows: Iterable[Row]) -> list[str]:
    found = {name for row in rows for name in row}
    middle = sorted(found - set(_FIRST) - set(_LAST))
    groups = ("after/", "before/", "won/", "version/")

    def group(name: str) -> int:
        return next((i for i, prefix in enumerate(groups) if name.startswith(prefix)), len(groups))

    middle.sort(key=group)
    return [*_FIRST, *middle, *_LAST]


def _score_text(score: tuple[float, float]) -> str:
    part, whole = score
    return f"{part:g}" if whole == 1 else f"{part:g}/{whole:g}"


def _write_csv(path: Path, columns: list[str], rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_records(folder: Path) -> Records:
    """Read the stored form of a study.

    Raises:
        InputError: The folder does not hold one, or a file of it is damaged.
    """
    try:
        outline = json.loads((folder / OUTLINE).read_text(encoding="utf-8"))
        rows = [_numbers(row) for row in _read_csv(folder / TRIALS)]
        questions = {
            cell: _read_questions(folder / QUESTIONS / f"{cell}.csv")
            for cell in outline["cells"]
            if (folder / QUESTIONS / f"{cell}.csv").is_file()
        }
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise InputError(
            f"{folder} is no stored study ({OUTLINE}, {TRIALS}, {QUESTIONS}/): {reason}. Give a "
            "study file, or a folder that `molf study report` wrote."
        ) from error
    return Records(outline, rows, questions)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


_TEXTS = (
    *("cell", "method", "phase", "state", "error", "score", "key", "commit", "device"),
    *("assignment", "assignment_key", "dirty", "python", "started", SETTINGS, TRAINED),
)
_INTEGER = re.compile(r"-?\d+")


def _numbers(row: Mapping[str, str]) -> Row:
    found: Row = {}
    for name, text in row.items():
        if text in ("", None):
            continue
        found[name] = text
        if name in _TEXTS or name.startswith("version/"):
            continue
        found[name] = int(text) if _INTEGER.fullmatch(text) else float(text)
    return found


def _read_questions(
    path: Path,
) -> dict[tuple[str, str, int, int], dict[str, dict[str, tuple[float, float]]]]:
    found: dict[tuple[str, str, int, int], dict[str, dict[str, tuple[float, float]]]] = {}
    for row in _read_csv(path):
        place = (row["method"], row["phase"], int(row["point"]), int(row["seed"]))
        scores = {
            name: _score(text) for name, text in row.items() if name not in _MATRIX and text != ""
        }
        found.setdefault(place, {})[row["metric"]] = scores
    return found


def _score(text: str) -> tuple[float, float]:
    part, _, whole = text.partition("/")
    return float(part), float(whole or 1)


def stored_results(records: Records) -> dict[str, TrialResult]:
    """Return the finished trials of a stored study, by key."""
    results = {}
    for row in filter(is_complete, records.rows):
        cell, *place = (row[name] for name in ("cell", *_MATRIX[:4]))
        scores = records.questions.get(cell, {}).get(tuple(place), {})
        kept = {name: value for name, value in row.items() if name not in _ADDED}
        hashes = (row.get(SETTINGS, ""), row.get(TRAINED, ""))
        results[row["key"]] = TrialResult(row["key"], kept, scores, *hashes)
    return results


def is_complete(row: Row) -> bool:
    """Return whether the trial of a row has its metrics."""
    return bool(row.get("state") == COMPLETE)
