"""The report of a study in Markdown, and its summary as CSV, from stored records alone."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from molf.disk.files import replacing_file, write_text
from molf.measure.estimate_texts import number_text
from molf.measure.estimates import Estimate
from molf.measure.meanings import meanings
from molf.study.choice import HARMS
from molf.study.reading import duration
from molf.study.report.records import Records, read_records
from molf.study.report.second_phase import MATCHED
from molf.study.report.sensitivity import WIDTH
from molf.study.report.summary import CellSummary, front_of, summarise
from molf.study.report.tables import (
    controls_table,
    differences_table,
    harms_of,
    methods_table,
    sensitivity_table,
)

REPORT_FILE, SUMMARY = "report.md", "summary.csv"
_SHOWN_FAILURES = 20
_CONTROLS = (
    "- Controls at equal rates have the rates of their method. Shares of full updates that differ "
    f"by more than {MATCHED * 100:g} points are marked as not share-matched; then the difference "
    "is also one of shares. shuffled:SCORE counts the layers that SCORE gives to full under its "
    "own moments, which are not those of a run of SCORE."
)


def write_report(folder: Path, *, figures: bool = True) -> Path:
    """Write the report of a stored study beside its records; return its path.

    Args:
        folder: A folder with the records; nothing else is read.
        figures: Whether to draw figures, which needs matplotlib.

    Raises:
        InputError: The folder holds no stored study, or matplotlib is missing.
    """
    records = read_records(folder)
    cells = summarise(records)
    pictures: dict[str, list[str]] = {}
    if figures:
        from molf.study.report.figures import draw_figures

        pictures = draw_figures(folder, cells)
    write_text(folder / REPORT_FILE, report_text(records, cells, pictures))
    _write_summary(folder / SUMMARY, cells)
    return folder / REPORT_FILE


def report_text(
    records: Records, cells: Sequence[CellSummary], pictures: dict[str, list[str]]
) -> str:
    """Return the report.

    Args:
        records: The stored study.
        cells: Its summary.
        pictures: Names of figures by cell.
    """
    outline = records.outline
    parts = [f"# {outline['study']}", str(outline.get("about") or "")]
    parts += [_origin(records), _missing(cells), _overview(cells)]
    parts += [_cell(cell, pictures.get(cell.name, [])) for cell in cells if cell.trials]
    parts.append(_notes(outline, cells))
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(records: Records) -> str:
    rows = records.rows
    if not rows:
        return "No trial is finished."
    states = Counter(row["state"] for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    flops = sum(row.get("training_flops", 0.0) for row in rows)

    def values(name: str) -> str:
        found = Counter(_plain(row[name]) for row in rows if name in row)
        return ", ".join(value for value, _ in found.most_common())

    lines = [
        f"- trials: {counts}",
        f"- time: {duration(seconds)} of workers; training {flops:.3g} FLOP (estimated)",
        f"- device: {values('device')}; CPUs: {values('cpu_count')}, torch threads: "
        f"{values('torch_threads')}",
        f"- commit: {', '.join(one[:12] for one in values('commit').split(', '))}",
        "- versions: "
        + ", ".join(
            f"{name} {values(f'version/{name}')}"
            for name in ("molf", "torch", "transformers", "trl", "peft")
        ),
    ]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Return a value of a row as text; a whole number without decimals."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _missing(cells: Sequence[CellSummary]) -> str:
    lines = [
        f"- {cell.name}, {one.name}: {'; '.join(one.missing)}"
        for cell in cells
        for one in cell.methods
        if one.missing and cell.trials
    ]
    lines += [f"- {cell.name}: all rows" for cell in cells if not cell.trials]
    failures = [
        f"- {cell.name}, {one.name}, {text}"
        for cell in cells
        for one in cell.methods
        for text in one.failures
    ]
    failed = [
        f"- {cell.name}, {one.name}: seeds {', '.join(map(str, one.failed_seeds))}; "
        f"{len(one.seeds)} are complete. Values are means of these, and comparisons are incomplete."
        for cell in cells
        for one in cell.methods
        if one.failed_seeds
    ]
    parts = []
    if lines:
        parts.append("\n".join(["## Missing rows", "", *lines]))
    if failed:
        parts.append("\n".join(["## Failed seeds on the test part", "", *failed]))
    if failures:
        more = len(failures) - _SHOWN_FAILURES
        shown = failures[:_SHOWN_FAILURES] + ([f"- and {more} more"] if more > 0 else [])
        parts.append("\n".join(["## Failed and pruned trials", "", *shown]))
    return "\n\n".join(parts)


def _overview(cells: Sequence[CellSummary]) -> str:
    return "\n".join(
        [
            "## Difference to the baseline",
            "",
            "Bold: the 95% interval excludes 0. The baseline's column has its value. A comparison "
            "that lacks seeds is incomplete and is never bold.",
            "",
            *differences_table(cells),
        ]
    )


def _cell(cell: CellSummary, pictures: Sequence[str]) -> str:
    base = "" if cell.base is None else f" Before training: {number_text(cell.base)}."
    direction = "lower" if cell.minimize else "higher"
    parts = [
        f"## {cell.name}",
        f"{cell.about} {cell.metric}: {direction} is better.{base}".strip(),
        "\n".join(methods_table(cell)),
        _edges(cell),
    ]
    if cell.controls:
        lead = "Scores against controls of their share of full updates (method minus control):"
        parts.append("\n".join([lead, "", *controls_table(cell)]))
    if curves := sensitivity_table(cell):
        lead = "The metric over the decade of rates around the chosen one, on the validation part:"
        parts.append("\n".join([lead, "", *curves]))
    parts += [
        f"Not beaten in both {cell.metric} and {harm}: {', '.join(front)}."
        for harm in harms_of(cell)
        if (front := front_of(cell, harm))
    ]
    parts.append(_unmoved(cell))
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(part for part in parts if part)


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


def _notes(outline: dict[str, Any], cells: Sequence[CellSummary]) -> str:
    choose, report = outline["choose"], outline["report"]
    lines = [
        "## How it was measured",
        "",
        f"- Rates were chosen on the validation part of the training data, seeds "
        f"{', '.join(map(str, choose['seeds']))}, sampler {choose['sampler']}; all methods of a "
        "cell had the same number of rate trials.",
        f"- Values are those of the chosen rates on the test part, seeds "
        f"{', '.join(map(str, report['seeds']))}.",
        "- Intervals are 95%, for new seeds and new questions. Where scores per question exist, "
        "the value is computed again without each seed, and without each question (jackknife); "
        "each variance has Student's quantile for its number, and the squares of the half widths "
        "are added. Else Student's t over seeds.",
        "- Baseline of a cell: of "
        + ", ".join(report["baseline"])
        + ", the best in the first phase.",
        *([_CONTROLS] if any(cell.controls for cell in cells) else []),
        f"- Mean and worst over rates: on the validation part, over {WIDTH:g} decade of the main "
        "rate, the chosen one in its middle and other rates as chosen; the mean is over the "
        "logarithm, interpolated linearly. Each method has a decade of its own, since scales of "
        "rates differ. Only methods with all of their decade tried compare. A failed trial counts "
        "as the worst value in the cell; a pruned one is left out.",
        "- Trials, minutes and FLOP include the rate trials. FLOP of training are estimated: 4 per "
        "token and parameter, and 2 per token and parameter with optimizer state. MoLF computes "
        "the gradient of every routed weight in each step, also where full never wins.",
    ]
    shown = dict.fromkeys([*(cell.metric for cell in cells), *HARMS])
    known = [name for name in shown if any(name in one for one in _metrics(cells))]
    lines += [f"- {names}: {meaning}" for names, meaning in meanings(known)]
    return "\n".join(lines)


def _metrics(cells: Sequence[CellSummary]) -> Iterable[set[str]]:
    for cell in cells:
        yield {cell.metric} | {harm for one in cell.methods for harm in one.harm}


def _write_summary(path: Path, cells: Sequence[CellSummary]) -> None:
    rows: list[dict[str, Any]] = []
    for cell in cells:
        for one in cell.methods:
            row: dict[str, Any] = {
                "cell": cell.name,
                "method": one.name,
                "rates": one.rates,
                "metric": cell.metric,
                **_columns("value", one.value),
                "baseline": cell.baseline or "",
                **_columns("difference", one.comparison.estimate if one.comparison else None),
                "seeds": len(one.seeds),
                "better_seeds": one.comparison.better if one.comparison else "",
            }
            for harm in HARMS:
                row |= _columns(harm, one.harm.get(harm))
            curve = one.sensitivity
            row |= {
                "full_share": _cell_text(one.full_share),
                "mean_over_decade": _cell_text(curve.area if curve else None),
                "worst_over_decade": _cell_text(curve.worst if curve else None),
                "tried_of_decade": _cell_text(curve.covered if curve else None),
                "trials": one.trials,
                "seconds": round(one.seconds, 1),
                "training_flops": f"{one.flops:.6g}",
                "trained_parameters": "" if one.trained is None else one.trained,
                "moved_parameters": "" if one.moved is None else one.moved,
                "failed_seeds": " ".join(map(str, one.failed_seeds)),
                "missing": "; ".join(one.missing),
            }
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["cell"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing_file(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _columns(name: str, found: Estimate | None) -> dict[str, str]:
    value, low, high = (None,) * 3 if found is None else (found.value, found.low, found.high)
    return {
        name: _cell_text(value),
        f"{name}_low": _cell_text(low),
        f"{name}_high": _cell_text(high),
    }


def _cell_text(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
