"""Completed stages of a run that has not ended, so that a resumed run repeats none of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from molf.checkpoint.store import delete_all
from molf.disk.files import write_json
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import CHECKPOINTS, ERROR_LOG, MODEL, read_json
from molf.job.record.result import evaluation_record
from molf.job.record.resumed_run import STAGES
from molf.job.settings.resolved import ResolvedSettings
from molf.measure import Evaluation, Metric


class Stages:
    """The evaluation of the base, and the training whose model is saved, in `checkpoints/`.

    Args:
        directory: The run's directory; its stages are read if it is resumed.
        settings: The run's settings. Without checkpoints, nothing is written.
    """

    def __init__(self, directory: RunDirectory, settings: ResolvedSettings) -> None:
        self._directory = directory
        self._settings = settings
        self._stages: dict[str, Any] = {}
        if directory.is_resumed:
            found = read_json(directory / CHECKPOINTS / STAGES)
            self._stages = found if isinstance(found, dict) else {}

    @property
    def before(self) -> Evaluation | None:
        """The evaluation of the base without its predictions; None before it was measured."""
        found = self._stages.get("before")
        if found is None:
            return None
        return Evaluation(
            metrics={name: _metric(metric) for name, metric in found["metrics"].items()},
            notes=found["notes"],
            tables={
                table: {
                    group: {name: _metric(metric) for name, metric in metrics.items()}
                    for group, metrics in groups.items()
                }
                for table, groups in found["tables"].items()
            },
        )

    @property
    def saved(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The records of the training and of its saved model; None before it was saved."""
        if not (self._directory / MODEL / "config.json").is_file():
            return None
        found = self._stages.get("saved")
        return None if found is None else (found["training"], found["model"])

    @property
    def evaluation_seconds(self) -> float:
        """Time of the base's evaluation; 0 before it was measured."""
        return float(self._stages.get("before", {}).get("seconds", 0.0))

    @property
    def trackers(self) -> dict[str, str]:
        """Identities of the trackers' runs, by tracker; empty before they were opened."""
        found = self._stages.get("trackers")
        return dict(found) if isinstance(found, dict) else {}

    def keep_trackers(self, opened: Mapping[str, str]) -> None:
        """Record the identities of the trackers' runs."""
        if opened:
            self._keep("trackers", {**self.trackers, **opened})

    def keep_before(self, evaluation: Evaluation, seconds: float) -> None:
        """Record that the base was measured, in this time."""
        record = evaluation_record(evaluation)
        tables = {name: record[name] for name in evaluation.tables}
        metrics = {name: record[name] for name in evaluation.metrics}
        record = {"metrics": metrics, "notes": evaluation.notes, "tables": tables}
        self._keep("before", {**record, "seconds": seconds})

    def keep_saved(self, training: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        """Record that the trained model was saved."""
        self._keep("saved", {"training": dict(training), "model": dict(model)})

    def clear(self) -> None:
        """Delete files that only a resumed run needs, after the run is complete."""
        place = self._directory / CHECKPOINTS
        with suppress(OSError):
            (self._directory / ERROR_LOG).unlink(missing_ok=True)
            (place / STAGES).unlink(missing_ok=True)
        if self._settings.save_steps is None:
            delete_all(place)
        with suppress(OSError):  # fails if other files are there
            place.rmdir()

    def _keep(self, name: str, value: Any) -> None:
        if not self._settings.has_checkpoints:
            return
        self._stages[name] = value
        place = self._directory / CHECKPOINTS
        # A disk that cannot be written costs a resumed run this stage, not this run its result.
        with suppress(OSError):
            place.mkdir(exist_ok=True)
            write_json(place / STAGES, self._stages)


def _metric(record: Mapping[str, Any]) -> Metric:
    numbers: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in record.items()
    }
    return Metric(**numbers)
