"""Recognise directories that molf wrote: runs, range tests, evaluations and exports.

`--overwrite` deletes, so a directory qualifies only if it has molf's record and no other files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from molf.disk.files import is_unfinished
from molf.inputs import reading_yaml
from molf.shown import listed

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
ROUTING = "routing"
ASSIGNMENT = "assignment.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
MODEL = "model"
LOW_HALVES = "low_halves.safetensors"
EVALUATION = "eval.json"
PREDICTIONS = "predictions.jsonl"
ERROR_LOG = "error.log"
EXPORT = "molf_export.json"
REPORT = "report.html"
SPECTRA = "spectra.json"
EXAMPLES = "examples.jsonl"
RATES, RATES_TABLE, RATES_FIGURE = "rates.json", "rates.csv", "rates.png"

_RUN_ENTRIES = frozenset(
    {
        CONFIG,
        ENVIRONMENT,
        METRICS,
        ROUTING,
        ASSIGNMENT,
        CHECKPOINTS,
        ADAPTER,
        MODEL,
        LOW_HALVES,
        EVALUATION,
        PREDICTIONS,
        ERROR_LOG,
        REPORT,
        SPECTRA,
        EXAMPLES,
    }
)


@dataclass(frozen=True)
class Ownership:
    """A kind of directory that molf writes.

    Attributes:
        what: Its name, for messages.
        fault: Returns why a directory is not of this kind, or a foreign file in it; None if it is.
    """

    what: str
    fault: Callable[[Path], str | None]


def _run_fault(path: Path) -> str | None:
    if not (path / CONFIG).is_file():
        return f"it has no {CONFIG}"
    if not is_run_config(read_yaml(path / CONFIG)):
        return f"its {CONFIG} is not that of a run"
    if not (path / ENVIRONMENT).is_file():
        return f"it has no {ENVIRONMENT}"
    return _foreign(
        entry
        for entry in path.iterdir()
        if entry.name not in _RUN_ENTRIES
        # A link may lead to an export outside of the run, which is not molf's to delete.
        and not (entry.is_dir() and not entry.is_symlink() and _export_fault(entry) is None)
    )


def _evaluation_fault(path: Path) -> str | None:
    for name in (CONFIG, MODEL):
        if (path / name).exists():
            return f"it has a {name}, as a run does"
    if not (path / EVALUATION).is_file():
        return f"it has no {EVALUATION}"
    record = read_json(path / EVALUATION)
    if not isinstance(record, dict) or not ("tasks" in record or "metrics" in record):
        return f"its {EVALUATION} is not that of an evaluation"
    return _foreign(
        entry
        for entry in path.iterdir()
        if entry.name not in (EVALUATION, REPORT) and entry not in predictions_in(path)
    )


def _export_fault(path: Path) -> str | None:
    if not (path / EXPORT).is_file():
        return f"it has no {EXPORT}"
    record = read_json(path / EXPORT)
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, list):
        return f"its {EXPORT} is not that of an export"
    return _foreign(entry for entry in path.iterdir() if entry.name not in (EXPORT, *files))


def _range_test_fault(path: Path) -> str | None:
    if not (path / RATES).is_file():
        return f"it has no {RATES}"
    record = read_json(path / RATES)
    if not isinstance(record, dict) or "sweeps" not in record:
        return f"its {RATES} is not that of a range test"
    own = (RATES, RATES_TABLE, RATES_FIGURE, ERROR_LOG)
    return _foreign(entry for entry in path.iterdir() if entry.name not in own)


A_RUN = Ownership("a run of molf train", _run_fault)
AN_EVALUATION = Ownership("an evaluation of molf eval", _evaluation_fault)
A_RANGE_TEST = Ownership("a range test of molf lr", _range_test_fault)
AN_EXPORT = Ownership("an export of molf export", _export_fault)


def is_run_config(config: Any) -> bool:
    """Return whether the content of a `config.yaml` is that of a run."""
    return isinstance(config, dict) and "method" in config and isinstance(config.get("run"), dict)


def is_run(path: Path) -> bool:
    """Return whether a directory is that of a run; other files in it are allowed."""
    return (path / CONFIG).is_file() and is_run_config(read_yaml(path / CONFIG))


def run_of_part(path: Path) -> Path | None:
    """Return the run that a path, links followed, is or lies in a part of; None without one."""
    place = Path(os.path.realpath(path))
    # By the entry's name: a folder of runs inside a run is no part of it.
    for part in (place, *place.parents):
        if part.name in _RUN_ENTRIES and is_run(part.parent):
            return part.parent
    return None


def predictions_in(path: Path) -> list[Path]:
    """Return the prediction files of an evaluation in a directory."""
    return sorted(entry for entry in path.glob("predictions*.jsonl") if entry.is_file())


def _foreign(entries: Iterable[Path]) -> str | None:
    names = sorted(entry.name for entry in entries if not is_unfinished(entry.name))
    return f"it holds {listed(names, 1)}, which molf did not write there" if names else None


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file; None if it is missing or cannot be read."""
    try:
        with reading_yaml():
            return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
