"""The file of a finished trial: its row and the score of each question."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from molf.disk.files import write_json
from molf.study.definition import LEARNING_RATE, LORA_RATE, RATIO, Point, Study
from molf.study.plan import COMPLETE, FAILED, Outcome, Planned

RESULTS, TRIALS = "results", "trials"


@dataclass(frozen=True)
class TrialResult:
    """A finished trial.

    Attributes:
        key: Its identity.
        row: Its row of the table of trials.
        questions: By metric, per question of the data (by its index) successes and attempts.
        settings: Hash of its settings with its rates; empty if it is not known.
        trained: Hash of its settings with the assignment that its rule made; empty without a rule.
    """

    key: str
    row: dict[str, Any]
    questions: dict[str, dict[str, tuple[float, float]]]
    settings: str = ""
    trained: str = ""


def run_directory(study: Study, cell: str, method: str, label: str) -> Path:
    """Return the directory of a trial's run."""
    return study.output_dir / TRIALS / cell / method / label


def result_file(study: Study, cell: str, method: str, label: str) -> Path:
    """Return the file of a finished trial."""
    return study.output_dir / RESULTS / cell / method / f"{label}.json"


def write_result(path: Path, result: TrialResult) -> None:
    """Write a finished trial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, vars(result))


def read_result(path: Path) -> TrialResult | None:
    """Return a finished trial; None if there is no such file, or a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        questions = {
            metric: {index: (float(part), float(whole)) for index, (part, whole) in found.items()}
            for metric, found in content["questions"].items()
        }
        hashes = (str(content.get(name, "")) for name in ("settings", "trained"))
        return TrialResult(str(content["key"]), dict(content["row"]), questions, *hashes)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


class Results:
    """The finished trials in a study's directory; a file is read again only after a change.

    Args:
        study: The study.

    Attributes:
        by_key: The trials by identity.
    """

    def __init__(self, study: Study) -> None:
        self._folder = study.output_dir / RESULTS
        self._read: dict[Path, tuple[tuple[int, int], TrialResult | None]] = {}
        self.by_key: dict[str, TrialResult] = {}
        self._by_settings: dict[str, TrialResult] = {}
        self._by_trained: dict[str, TrialResult] = {}

    def refresh(self) -> Results:
        """Read new and changed files, and forget deleted ones; return these results."""
        found = {}
        for path in sorted(self._folder.glob("*/*/*.json")):
            try:
                status = path.stat()
            except FileNotFoundError:  # deleted since it was listed
                continue
            stamp = (status.st_mtime_ns, status.st_size)
            known = self._read.get(path)
            found[path] = (
                known if known is not None and known[0] == stamp else (stamp, read_result(path))
            )
        self._read = found
        results = [result for _, result in found.values() if result is not None]
        self.by_key = {result.key: result for result in results}
        self._by_settings = {result.settings: result for result in results if result.settings}
        self._by_trained = {result.trained: result for result in results if result.trained}
        return self

    def delete(self, key: str) -> None:
        """Delete the file of a trial, if it has one, so that the trial can run again."""
        for path, (_, result) in self._read.items():
            if result is not None and result.key == key:
                path.unlink(missing_ok=True)

    def of(self, planned: Planned, point: Point) -> TrialResult | None:
        """Return the result of a trial at a point: its own, or one of equal settings elsewhere.

        One elsewhere without a finite metric of the trial's cell is not returned.
        """
        own = self.by_key.get(planned.key)
        if own is not None:
            return own
        return _placed(self._by_settings.get(planned.settings_key(point)), planned, point)

    def trained(self, planned: Planned, point: Point, trained: str) -> TrialResult | None:
        """Return the result of a trial from one elsewhere with equal settings and assignment.

        Args:
            planned: The trial.
            point: Its rates.
            trained: As `TrialResult.trained`.
        """
        found = _placed(self._by_trained.get(trained), planned, point)
        return None if found is None else replace(found, settings=planned.settings_key(point))


def _placed(other: TrialResult | None, planned: Planned, point: Point) -> TrialResult | None:
    """Return the result of another trial as that of this one; None if this one failed by it."""
    # Else a failed trial could not run again.
    if other is None or outcome_of(other, planned.cell.metric).state == FAILED:
        return None
    return replace(other, key=planned.key, row={**other.row, **place_columns(planned, point)})


def all_results(study: Study) -> dict[str, TrialResult]:
    """Return all finished trials in the study's directory, by key."""
    return Results(study).refresh().by_key


def place_columns(planned: Planned, point: Point) -> dict[str, Any]:
    """Return the columns of a row that depend on the trial's place in the study."""
    return {
        "cell": planned.cell.name,
        "method": planned.method.name,
        "phase": planned.phase,
        "point": planned.index,
        "seed": planned.seed,
        LEARNING_RATE: point.get(LEARNING_RATE),
        RATIO: point.get(RATIO),
        LORA_RATE: planned.at(point).lora_learning_rate,
        "key": planned.key,
    }


def point_of(row: Mapping[str, Any]) -> Point:
    """Return the rates of a row as a point."""
    is_ratio = row.get(RATIO) not in (None, "")
    names = (LEARNING_RATE, RATIO if is_ratio else LORA_RATE)
    return {name: float(row[name]) for name in names if row.get(name) not in (None, "")}


def outcome_of(result: TrialResult, metric: str) -> Outcome:
    """Return the outcome of a finished trial by a metric; a failure if the metric is missing."""
    row = result.row
    point = point_of(row)
    value = row.get(f"after/{metric}")
    seconds = float(row.get("seconds") or 0.0)
    share = row.get("won/full")
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        metrics = ", ".join(k.removeprefix("after/") for k in row if k.startswith("after/"))
        error = f"the run has no finite metric {metric}; it has {metrics}"
        return Outcome(FAILED, None, point, share, seconds, error)
    return Outcome(COMPLETE, float(value), point, share, seconds)
