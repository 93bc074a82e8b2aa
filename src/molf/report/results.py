"""Tables of metrics for a page: before and after, or several runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from molf.amounts import fixed
from molf.measure.meanings import is_lower_better, meanings
from molf.report.run_data import Evaluated, MetricTable, RunData, Value

_WIDTH, _STEP, _EDGE = 160, 12, 6  # of a picture of intervals, in pixels


@dataclass(frozen=True)
class Shown:
    """A value as text."""

    value: str
    interval: str


@dataclass(frozen=True)
class ShownRow:
    """A row of metrics: a cell per column, and a picture of their intervals."""

    name: str
    cells: tuple[Shown | None, ...]
    picture: str


@dataclass(frozen=True)
class ShownPart:
    """A break-down of metrics by group."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ShownTask:
    """The metrics of a task.

    Attributes:
        title: Name of the task.
        text: The change of the first metric, in a sentence.
        columns: Names of the columns of values.
        rows: The metrics.
        meanings: Names and meaning of the metrics.
        parts: Break-downs.
        notes: Notes of the evaluation as text; empty without any.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[ShownRow, ...]
    meanings: tuple[tuple[str, str], ...]
    parts: tuple[ShownPart, ...]
    notes: str


def shown_results(runs: Sequence[RunData]) -> list[ShownTask]:
    """Return the metrics of runs by task; with several runs, a column for each."""
    tasks = dict.fromkeys(one.task for run in runs for one in run.evaluated)
    return [_shown(task, runs) for task in tasks]


def _shown(task: str, runs: Sequence[RunData]) -> ShownTask:
    found = [(run, one) for run in runs for one in run.evaluated if one.task == task]
    columns: list[tuple[str, dict[str, Value | None]]] = []
    for run, one in found:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        if one.has_before:
            columns.append((f"{prefix}before", {x.name: x.before for x in one.metrics.rows}))
        after = f"{prefix}after" if one.has_before else prefix.removesuffix(": ") or "value"
        columns.append((after, {x.name: x.after for x in one.metrics.rows}))
    names = dict.fromkeys(chain.from_iterable(values for _, values in columns))
    rows = tuple(_row(name, [values.get(name) for _, values in columns]) for name in names)
    (_, first) = found[0]
    notes = {run.name if len(runs) > 1 else "notes": one.notes for run, one in found if one.notes}
    return ShownTask(
        title=task,
        text=_sentence(first, several=len(runs) > 1),
        columns=tuple(name for name, _ in columns),
        rows=rows,
        meanings=tuple(meanings(names)),
        parts=tuple(
            _part(name, tables, run.name if len(runs) > 1 else "", has_before=one.has_before)
            for run, one in found
            for name, tables in one.groups.items()
        ),
        notes=_notes(notes),
    )


def _row(name: str, values: list[Value | None]) -> ShownRow:
    label = f"{name} (lower is better)" if is_lower_better(name) else name
    return ShownRow(label, tuple(map(_cell, values)), _picture(name, values))


def _cell(value: Value | None) -> Shown | None:
    if value is None:
        return None
    ends = "" if math.isnan(value.low) else f"{_number(value.low)} to {_number(value.high)}"
    return Shown(_number(value.value), f"{ends} (n {value.count:,})".strip())


def _number(value: float) -> str:
    return fixed(value, 3) if abs(value) < 100 else f"{value:,.4g}"


def _picture(name: str, values: Sequence[Value | None]) -> str:
    """Return a drawing of the intervals, for those who see it: the table has the numbers."""
    known = [one for one in values if one is not None]
    if not known:
        return ""
    ends = [x for one in known for x in (one.value, one.low, one.high) if not math.isnan(x)]
    low, high = min(ends), max(ends)
    if low >= 0 and high <= 1 and not is_lower_better(name):
        low, high = 0.0, 1.0
    spread = (high - low) or 1.0

    def place(value: float) -> float:
        return round(_EDGE + (value - low) / spread * (_WIDTH - 2 * _EDGE), 1)

    height = _STEP * len(values) + 2
    drawn = []
    for number, one in enumerate(values):
        y = _STEP * number + _STEP / 2 + 1
        drawn.append(f'<line class="rule" x1="0" x2="{_WIDTH}" y1="{y}" y2="{y}"/>')
        if one is None:
            continue
        if not math.isnan(one.low):
            ends_of = f'x1="{place(one.low)}" x2="{place(one.high)}" y1="{y}" y2="{y}"'
            drawn.append(f'<line class="i{number % 4}" stroke-width="3" {ends_of}/>')
        drawn.append(f'<circle class="i{number % 4}" cx="{place(one.value)}" cy="{y}" r="4"/>')
    # Only numbers and class names of this file.
    return (
        f'<svg class="interval" viewBox="0 0 {_WIDTH} {height}" aria-hidden="true">'
        f"{''.join(drawn)}</svg>"
    )


def _sentence(task: Evaluated, *, several: bool) -> str:
    where = "Intervals are of 95%; dots in the order of the columns."
    row = task.metrics.rows[0] if task.metrics.rows else None
    if several or row is None or row.before is None or row.after is None:
        return where
    change = row.after.value - row.before.value
    return (
        f"{row.name} {_number(row.before.value)} before, {_number(row.after.value)} after "
        f"({change:+.3f}). {where}"
    )


def _part(name: str, tables: Sequence[MetricTable], run: str, *, has_before: bool) -> ShownPart:
    metrics = dict.fromkeys(row.name for table in tables for row in table.rows)
    rows = []
    for table in tables:
        known = {row.name: row for row in table.rows}
        cells = [table.title]
        for metric in metrics:
            row = known.get(metric)
            both = () if row is None else (row.before, row.after) if has_before else (row.after,)
            cells.append(" → ".join("-" if x is None else _number(x.value) for x in both) or "-")
        count = next((x.count for row in table.rows for x in (row.after, row.before) if x), 0)
        rows.append((*cells, f"{count:,}"))
    title = name.replace("_", " ").capitalize()
    return ShownPart(
        f"{run}: {title}" if run else title,
        ("group", *(f"{x} (before → after)" if has_before else x for x in metrics), "n"),
        tuple(rows),
    )


def _notes(notes: dict[str, Any]) -> str:
    """Return the notes that have something to report; empty without any."""
    kept = _without_empty(notes)
    return json.dumps(kept, indent=2, ensure_ascii=False) if kept else ""


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        made = {name: _without_empty(one) for name, one in value.items()}
        return {name: one for name, one in made.items() if one not in ({}, [], 0, None, "")}
    return value
