"""The progress of a study: finished trials, expected end, failures, best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from molf.measure.meanings import UNRECORDED_VERSION, last_change
from molf.shown import counted
from molf.study.definition import CHOOSE, Cell, Method, Study
from molf.study.plan import COMPLETE, FAILED, PRUNED, Outcome, Plan
from molf.study.snapshot import Snapshot

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Best:
    """The best trial of the first phase so far in a cell.

    Attributes:
        cell: The cell.
        method: The method.
        label: The trial.
        value: The cell's metric.
    """

    cell: Cell
    method: str
    label: str
    value: float


@dataclass(frozen=True)
class Status:
    """The progress of a study.

    Attributes:
        size: Trials of both phases; an upper bound until the points of controls are known.
        complete: Finished trials.
        failed: Failed trials, each as `CELL/METHOD/TRIAL: ERROR`.
        pruned: Number of pruned trials.
        running: By trial, the name of its worker.
        seconds: Expected seconds until the end with the running workers; with one worker if none
            is running.
        measured: Whether these come from finished trials, and not from the study file.
        best: Per cell, the best trial of the first phase.
        chosen: Number of methods and cells with chosen rates.
        origin: A sentence if rows come from several commits or uncommitted changes, or have metrics
            of several versions; else empty.
    """

    size: int
    complete: int
    failed: list[str]
    pruned: int
    running: dict[str, str]
    seconds: float
    measured: bool
    best: list[Best]
    chosen: int
    origin: str

    @property
    def left(self) -> int:
        """The number of trials that have not ended."""
        return max(0, self.size - self.complete - self.pruned - len(self.failed))


def status_of(study: Study, plan: Plan, snapshot: Snapshot, rows: Iterable[Row]) -> Status:
    """Return the progress of a study.

    Args:
        study: The study.
        plan: Its trials.
        snapshot: Their state.
        rows: The rows of finished trials.
    """
    ended = [
        (trial, snapshot.outcomes[trial.key])
        for trial in plan.trials
        if trial.key in snapshot.outcomes
    ]
    failed = [
        f"{t.cell.name}/{t.method.name}/{t.label(o.point or t.point or {})}: {o.error}"
        for t, o in ended
        if o.state == FAILED
    ]
    running = {
        f"{t.cell.name}/{t.method.name}/{t.label(t.point or snapshot.drawn.get(t.key) or {})}": (
            snapshot.running[t.key]
        )
        for t in plan.trials
        if t.key in snapshot.running
    }
    seconds, measured = _seconds_left(study, plan, snapshot.outcomes)
    best = []
    for cell in study.cells:
        values = [
            Best(cell, t.method.name, t.label(o.point), o.value)
            for t, o in ended
            if t.cell == cell and t.phase == CHOOSE and o.value is not None
        ]
        sign = 1 if cell.minimize else -1
        best += sorted(values, key=lambda one: sign * one.value)[:1]
    return Status(
        size=sum(plan.sizes.values()),
        complete=sum(o.state == COMPLETE for _, o in ended),
        failed=failed,
        pruned=sum(o.state == PRUNED for _, o in ended),
        running=running,
        seconds=seconds / max(1, len(running)),
        measured=measured,
        best=best,
        chosen=sum(choice is not None for choice in plan.choices.values()),
        origin=origin_of(rows),
    )


def metrics_version(row: Row, recorded: int | None = None) -> int:
    """Return the last version that changed one of a row's metrics, up to the recorded one.

    Args:
        row: The row.
        recorded: Another version than that of the row.
    """
    names = (name.removeprefix("after/") for name in row if name.startswith("after/"))
    return last_change(names, recorded or int(row.get("metrics_version") or UNRECORDED_VERSION))


def mixed_metrics(rows: Iterable[Row]) -> list[str]:
    """Return a sentence for each cell whose rows have metrics of several versions."""
    counts: dict[str, Counter[int]] = {}
    for row in rows:
        if any(name.startswith("after/") for name in row):
            counts.setdefault(str(row["cell"]), Counter())[metrics_version(row)] += 1
    return [
        f"rows of {cell} have metrics of several versions, which may differ for equal answers: "
        + ", ".join(f"version {version} ({count})" for version, count in sorted(found.items()))
        for cell, found in counts.items()
        if len(found) > 1
    ]


def origin_of(rows: Iterable[Row]) -> str:
    """Return a sentence about rows of several commits, changes or metrics; empty without."""
    found = list(rows)
    commits = Counter(str(row["commit"])[:12] for row in found if row.get("commit"))
    dirty = sum(str(row.get("dirty")) == "True" for row in found)
    parts = []
    if len(commits) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in commits.most_common())
        parts.append(f"rows come from {len(commits)} commits: {listed}")
    if dirty:
        parts.append(f"{dirty} of {counted(len(found), 'row')} had uncommitted changes")
    parts += mixed_metrics(found)
    return "; ".join(parts)


def _seconds_left(study: Study, plan: Plan, outcomes: Mapping[str, Outcome]) -> tuple[float, bool]:
    """Return the seconds of all trials that have not ended, one after another."""
    measured: dict[tuple[str, str], list[float]] = {}
    for trial in plan.trials:
        outcome = outcomes.get(trial.key)
        if outcome is not None and outcome.state == COMPLETE and outcome.seconds > 0:
            measured.setdefault((trial.cell.name, trial.method.name), []).append(outcome.seconds)

    def expected(cell: Cell, method: Method) -> float:
        same = measured.get((cell.name, method.name))
        cells = [s for (name, _), found in measured.items() if name == cell.name for s in found]
        every = [s for found in measured.values() for s in found]
        return fmean(same or cells or every or [study.seconds])

    total = 0.0
    for cell in study.cells:
        for method in study.methods:
            size = plan.sizes[cell.name, method.name]
            done = sum(
                t.cell == cell and t.method == method and t.key in outcomes for t in plan.trials
            )
            total += max(0, size - done) * expected(cell, method)
    return total, bool(measured)
