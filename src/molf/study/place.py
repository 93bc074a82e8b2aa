"""The directory of a study, and what changes in its file mean for finished trials."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molf.disk.files import is_unfinished, write_json
from molf.disk.room import check_writable, nearest_existing
from molf.errors import InputError
from molf.job.record.contents import contents_of
from molf.job.record.ownership import read_json
from molf.paths import check_path, check_unicode
from molf.study.assigning.making import PROBES
from molf.study.definition import Rates, Study
from molf.study.outcome import RESULTS, TRIALS, Results, TrialResult, outcome_of, point_of
from molf.study.plan import FAILED, Outcome, Plan, TrialMaker

RECORD = "study.json"
_FORMAT = 2  # of the record and of the results; others have other identities
_OWN = (RESULTS, TRIALS, PROBES, "report")
_SHOWN = 12  # differences in a message


@dataclass(frozen=True)
class Change:
    """The difference between a study's file and its finished trials.

    Attributes:
        differences: One text each.
        kept: Finished trials that are part of the changed study.
        left_out: Finished trials that are not.
    """

    differences: list[str]
    kept: int
    left_out: int

    def __str__(self) -> str:
        """The differences and their effect in one line."""
        shown = "; ".join(self.differences[:_SHOWN])
        more = len(self.differences) - _SHOWN
        shown += f"; and {more} more" if more > 0 else ""
        total = self.kept + self.left_out
        if total == 0:
            return (
                "The study file differs from that of the study in its output_dir, which has no "
                f"finished trials yet: {shown}."
            )
        return (
            f"The study file or its data differ from those of its {total} finished trials: "
            f"{shown}. {self.kept} of them are also trials of the changed study and are not "
            f"repeated; {self.left_out} are left out of its tables."
        )


def definition_of(study: Study) -> dict[str, Any]:
    """Return everything of a study that decides its trials and tables, as JSON values."""
    definition = {
        "cells": {
            cell.name: {
                "options": dict(cell.options),
                "contents": contents_of(cell.options),
                "metric": cell.metric,
                "minimize": cell.minimize,
                "rates": {name: _rates(rates) for name, rates in cell.rates.items()},
            }
            for cell in study.cells
        },
        "methods": {
            method.name: {
                "options": dict(method.options),
                "rates": _rates(method.rates),
                "control_of": method.control_of,
                "share_of": method.share_of,
                # Records of earlier studies have no such keys.
                **({} if method.rule is None else {"assignment": method.rule.as_values()}),
                **({"contents": found} if (found := contents_of(method.options)) else {}),
            }
            for method in study.methods
        },
        "choose": {
            "sampler": study.choose.sampler,
            "trials": study.choose.trials,
            "seeds": list(study.choose.seeds),
            "prune": study.choose.prune,
        },
        "report": {"seeds": list(study.report.seeds), "baseline": list(study.report.baseline)},
    }
    plain: dict[str, Any] = json.loads(json.dumps(definition, default=str))
    return plain


def _rates(rates: Rates) -> Any:
    if rates.ranges:
        return {name: {"low": one.low, "high": one.high} for name, one in rates.ranges.items()}
    return [dict(point) for point in rates.points]


def check_directory(study: Study) -> None:
    """Check that the study's directory can be used, without writing anything.

    Raises:
        InputError: It belongs to another study, holds other files, or cannot be written.
    """
    path = study.output_dir
    check_path(path, "output_dir")
    check_unicode(path, "output_dir")
    if path.exists() and not path.is_dir():
        raise InputError(f"output_dir {path} is a file. Give a directory.")
    record = read_record(path)
    if record is not None and record.get("study") != study.name:
        raise InputError(
            f"output_dir {path} is that of the study {record.get('study')!r}, not of "
            f"{study.name!r}. Give another output_dir, or the same name."
        )
    if record is not None and record.get("format") != _FORMAT:
        raise InputError(
            f"output_dir {path} is that of another version of molf, whose trials this one cannot "
            "continue. Give another output_dir."
        )
    if record is None and path.is_dir():
        foreign = [e.name for e in path.iterdir() if not is_unfinished(e.name)]
        if any(name in _OWN for name in foreign):
            raise InputError(
                f"output_dir {path} has trials of a study, but its record {RECORD} is missing or "
                "damaged. Restore it, or give another output_dir."
            )
        if foreign and not _is_starting(foreign):
            raise InputError(
                f"output_dir {path} holds {sorted(foreign)[0]} and is not that of a study. Give a "
                "directory that is new or empty."
            )
    check_writable(nearest_existing(path), f"output_dir {path}")


def _is_starting(names: list[str]) -> bool:
    """Return whether these are files of a study that another worker is just starting."""
    return all(name.startswith((".optuna", "optuna.sqlite")) for name in names)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a study's directory; None if it has none."""
    record = read_json(path / RECORD)
    return record if isinstance(record, dict) else None


def find_change(study: Study, make: TrialMaker) -> Change | None:
    """Return how the file differs from the definition of finished trials; None if it does not."""
    record = read_record(study.output_dir)
    if record is None or record.get("definition") == definition_of(study):
        return None
    results = Results(study).refresh().by_key
    plan = plan_of(study, make, results)
    # A trial of another place with equal settings is reused.
    settings = {trial.settings_key(trial.point) for trial in plan.trials if trial.point}
    kept = sum(key in plan.by_key or result.settings in settings for key, result in results.items())
    differences = list(_differences(record.get("definition") or {}, definition_of(study), ""))
    return Change(differences, kept, len(results) - kept)


def plan_of(study: Study, make: TrialMaker, results: Mapping[str, TrialResult]) -> Plan:
    """Return the trials of a study that are known from finished trials.

    A trial without a result counts as failed: one that has failed has none, and rates are chosen
    after it.

    Args:
        study: The study.
        make: Makes its trials.
        results: Finished trials by key, also of other studies.
    """
    metrics = {cell.name: cell.metric for cell in study.cells}
    outcomes = {
        key: outcome_of(result, metrics[result.row["cell"]])
        for key, result in results.items()
        if result.row.get("cell") in metrics
    }
    drawn = {key: point_of(result.row) for key, result in results.items()}
    while (plan := Plan(study, outcomes, make, drawn)).unfinished:
        outcomes |= {trial.key: Outcome(FAILED, None, {}) for trial in plan.unfinished}
    return plan


def check_unchanged(change: Change | None, *, accepted: bool) -> None:
    """Reject a changed study file, or another one with the same directory, unless accepted.

    Raises:
        InputError: It changed; the message has the differences and their effect.
    """
    if change is not None and not accepted:
        raise InputError(f"{change} Give --accept_changes to go on, or another output_dir.")


def write_record(study: Study) -> None:
    """Create the study's directory, and write its record."""
    study.output_dir.mkdir(parents=True, exist_ok=True)
    record = {"study": study.name, "format": _FORMAT, "definition": definition_of(study)}
    if read_record(study.output_dir) != record:
        write_json(study.output_dir / RECORD, record)


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """Yield one text for each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in (*old, *(name for name in new if name not in old)):
            place = f"{where}.{name}" if where else str(name)
            if name not in new:
                yield f"{place} removed"
            elif name not in old:
                yield f"{place} added"
            else:
                yield from _differences(old[name], new[name], place)
    elif old != new:
        yield f"{where} {_brief(old)} -> {_brief(new)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
