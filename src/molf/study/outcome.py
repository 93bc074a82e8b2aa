"""The file of a finished trial: its row and the score of each question."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.disk.files import write_json
from molf.study.definition import Study

RESULTS, TRIALS = "results", "trials"


@dataclass(frozen=True)
class TrialResult:
    """A finished trial.

    Attributes:
        key: Its identity.
        row: Its row of the table of trials.
        questions: By metric, per question of the data (by its index) successes and attempts.
    """

    key: str
    row: dict[str, Any]
    questions: dict[str, dict[str, tuple[float, float]]]


def run_directory(study: Study, cell: str, method: str, label: str) -> Path:
    """Return the directory of a trial's run."""
    return study.output_dir / TRIALS / cell / method / label


def result_file(study: Study, cell: str, method: str, label: str) -> Path:
    """Return the file of a finished trial."""
    return study.output_dir / RESULTS / cell / method / f"{label}.json"


def write_result(path: Path, result: TrialResult) -> None:
    """Write a finished trial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": result.key, "row": result.row, "questions": result.questions})


def read_result(path: Path) -> TrialResult | None:
    """Return a finished trial; None if there is no such file, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        questions = {
            metric: {index: (float(part), float(whole)) for index, (part, whole) in found.items()}
            for metric, found in content["questions"].items()
        }
        return TrialResult(str(content["key"]), dict(content["row"]), questions)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def all_results(study: Study) -> dict[str, TrialResult]:
    """Return all finished trials in the study's directory, by key."""
    found = {}
    for path in sorted((study.output_dir / RESULTS).glob("*/*/*.json")):
        result = read_result(path)
        if result is not None:
            found[result.key] = result
    return found
