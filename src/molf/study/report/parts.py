"""The report of a study as parts: texts, tables and figures, from stored records alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from molf.amounts import duration
from molf.measure.estimate_texts import number_text
from molf.measure.meanings import meanings, metric_names
from molf.report.document import Part, shown_table
from molf.study.choice import HARMS
from molf.study.report.assigned import ABOUT, TITLE, assigned_table, findings
from molf.study.report.figures import figures_of
from molf.study.report.records import Records, total_of
from molf.study.report.second_phase import MATCHED
from molf.study.report.sensitivity import WIDTH
from molf.study.report.summary import CellSummary, front_of
from molf.study.report.tables import (
    controls_table,
    differences_table,
    harms_of,
    methods_table,
    sensitivity_table,
)
from molf.study.status import mixed_metrics

_SHOWN_FAILURES = 20
_CONTROLS = (
    "Controls at equal rates have the rates of their method. Shares of full updates that differ "
    f"by more than {MATCHED * 100:g} points are marked as not share-matched; then the difference "
    "is also one of shares. shuffled:SCORE counts the layers that SCORE gives to full under its "
    "own moments, which are not those of a run of SCORE."
)

_ASSIGNED = (
    "The share of full of method hybrid is that of the layers' weights in full. Its minutes and "
    "FLOP include the probe of each trial, also one that several rows share."
)


def parts_of(records: Records, cells: Sequence[CellSummary]) -> list[Part]:
    """Return the parts of the report.

    Args:
        records: The stored study.
        cells: Its summary.
    """
    return [
        _origin(records),
        *_missing(records, cells),
        _overview(cells),
        *_assigned(cells),
        *(_cell(cell) for cell in cells if cell.trials),
        _notes(records.outline, cells),
    ]


def _origin(records: Records) -> Part:
    rows = records.rows
    if not rows:
        return Part("Trials", text=("No trial is finished.",))
    states = Counter(row["state"] for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    seconds = total_of(rows, "seconds", "probe_seconds")
    flops = total_of(rows, "training_flops", "probe_flops")

    def values(name: str) -> str:
        found = Counter(_plain(row[name]) for row in rows if name in row)
        return ", ".join(value for value, _ in found.most_common())

    commits = values("commit")  # none beside an installed package
    lines = [
        f"trials: {counts}",
        f"time: {duration(seconds)}; training {flops:.3g} FLOP (estimated). A training or a probe "
        "that several rows share counts once.",
        f"device: {values('device')}; CPUs: {values('cpu_count')}, torch threads: "
        f"{values('torch_threads')}",
        f"commit: {', '.join(one[:12] for one in commits.split(', ')) or 'unknown'}",
        "versions: "
        + ", ".join(
            f"{name} {values(f'version/{name}')}"
            for name in ("molf", "torch", "transformers", "trl", "peft")
        ),
    ]
    return Part("Trials", lines=tuple(lines))


def _plain(value: Any) -> str:
    """Return a value of a row as text; a whole number without decimals."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _missing(records: Records, cells: Sequence[CellSummary]) -> Iterator[Part]:
    lines = [
        f"{cell.name}, {one.name}: {'; '.join(one.missing)}"
        for cell in cells
        for one in cell.methods
        if one.missing and cell.trials
    ]
    lines += [f"{cell.name}: all rows" for cell in cells if not cell.trials]
    failures = [
        f"{cell.name}, {one.name}, {text}"
        for cell in cells
        for one in cell.methods
        for text in one.failures
    ]
    failed = [
        f"{cell.name}, {one.name}: seeds {', '.join(map(str, one.failed_seeds))}; "
        f"{len(one.seeds)} are complete. Values are means of these, and comparisons are incomplete."
        for cell in cells
        for one in cell.methods
        if one.failed_seeds
    ]
    more = len(failures) - _SHOWN_FAILURES
    failures = failures[:_SHOWN_FAILURES] + ([f"and {more} more"] if more > 0 else [])
    for title, found in (
        ("Missing rows", lines),
        ("Failed seeds on the test part", failed),
        ("Failed and pruned trials", failures),
        ("Metrics of several versions", mixed_metrics(records.rows)),
    ):
        if found:
            yield Part(title, lines=tuple(found))


def _overview(cells: Sequence[CellSummary]) -> Part:
    text = (
        "Bold: the 95% interval excludes 0. The baseline's column has its value. A comparison "
        "that lacks seeds is incomplete and is never bold."
    )
    table = shown_table(differences_table(cells))
    return Part("Difference to the baseline", text=(text,), tables=(table,))


def _assigned(cells: Sequence[CellSummary]) -> Iterator[Part]:
    if found := findings(cells):
        table = shown_table(assigned_table(cells))
        yield Part(TITLE, text=(ABOUT,), tables=(table,), lines=tuple(found))


def _cell(cell: CellSummary) -> Part:
    base = "" if cell.base is None else f" Before training: {number_text(cell.base)}."
    direction = "lower" if cell.minimize else "higher"
    tables = [shown_table(methods_table(cell))]
    if cell.controls:
        lead = "Scores against controls of their share of full updates (method minus control):"
        tables.append(shown_table(controls_table(cell), lead))
    if curves := sensitivity_table(cell):
        lead = "The metric over the decade of rates around the chosen one, on the validation part:"
        tables.append(shown_table(curves, lead))
    fronts = [
        f"Not beaten in both {cell.metric} and {harm}: {', '.join(front)}."
        for harm in harms_of(cell)
        if (front := front_of(cell, harm))
    ]
    return Part(
        cell.name,
        text=(f"{cell.about} {cell.metric}: {direction} is better.{base}".strip(),),
        tables=tuple(tables),
        lines=tuple(filter(None, (_edges(cell), *fronts, _unmoved(cell)))),
        figures=tuple(figures_of(cell)),
    )


def _edges(cell: CellSummary) -> str:
    names = [one.name for one in cell.methods if one.edges]
    if not names:
        return ""
    return (
        f"Chosen at the edge of the tried rates: {', '.join(names)}. A better rate may lie outside."
    )


def _unmoved(cell: CellSummary) -> str:
    lines = [
        f"{one.name}: {one.trained:,} parameters have optimizer state, and updates changed "
        f"{one.moved:,} of them."
        for one in cell.methods
        if one.trained is not None and one.moved is not None and one.moved < one.trained
    ]
    return " ".join(lines)


def _notes(outline: dict[str, Any], cells: Sequence[CellSummary]) -> Part:
    choose, report = outline["choose"], outline["report"]
    lines = [
        f"Rates were chosen on the validation part of the training data, seeds "
        f"{', '.join(map(str, choose['seeds']))}, sampler {choose['sampler']}; all methods of a "
        "cell had the same number of rate trials.",
        f"Values are those of the chosen rates on the test part, seeds "
        f"{', '.join(map(str, report['seeds']))}.",
        "Intervals are 95%, for new seeds and new questions. Where scores per question exist, "
        "the value is computed again without each seed, and without each question (jackknife); "
        "each variance has Student's quantile for its number, and the squares of the half widths "
        "are added. Else Student's t over seeds.",
        "Baseline of a cell: of "
        + ", ".join(report["baseline"])
        + ", the best in the first phase.",
        *([_CONTROLS] if any(cell.controls for cell in cells) else []),
        *([_ASSIGNED] if any(one.rule for cell in cells for one in cell.methods) else []),
        f"Mean and worst over rates: on the validation part, over {WIDTH:g} decade of the main "
        "rate, the chosen one in its middle and other rates as chosen; the mean is over the "
        "logarithm, interpolated linearly. Each method has a decade of its own, since scales of "
        "rates differ. Only methods with all of their decade tried compare. A failed trial counts "
        "as the worst value in the cell; a pruned one is left out.",
        "Trials, minutes and FLOP include the rate trials. FLOP of training are estimated: 4 per "
        "token and parameter, and 2 per token and parameter with optimizer state. MoLF computes "
        "the gradient of every routed weight in each step, also where full never wins.",
    ]
    measured: set[str] = set().union(*_metrics(cells))
    shown = measured.intersection([*(cell.metric for cell in cells), *HARMS])
    known = [name for name in metric_names() if name in shown]
    lines += [f"{names}: {meaning}" for names, meaning in meanings(known)]
    return Part("How it was measured", lines=tuple(lines))


def _metrics(cells: Sequence[CellSummary]) -> Iterable[set[str]]:
    for cell in cells:
        yield {cell.metric} | {harm for one in cell.methods for harm in one.harm}
