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
from molf.measure.meanings import meanings
from molf.study.reading import duration
from molf.study.report.records import Records, read_records
from molf.study.report.statistics import Estimate
from molf.study.report.summary import (
    FORGETTING,
    HARMS,
    CellSummary,
    Comparison,
    MethodSummary,
    front_of,
    summarise,
)

REPORT_FILE, SUMMARY = "report.md", "summary.csv"
_SHOWN_FAILURES = 20


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
        found = Counter(str(row[name]) for row in rows if name in row)
        return ", ".join(value for value, _ in found.most_common())

    lines = [
        f"- trials: {counts}",
        f"- time: {duration(seconds)} of workers; training {flops:.3g} FLOP (estimated)",
        f"- device: {values('device')}; {values('cpu_count')} CPUs, "
        f"{values('torch_threads')} torch threads",
        f"- commit: {', '.join(one[:12] for one in values('commit').split(', '))}",
        "- versions: "
        + ", ".join(
            f"{name} {values(f'version/{name}')}"
            for name in ("molf", "torch", "transformers", "trl", "peft")
        ),
    ]
    return "\n".join(lines)


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
    parts = []
    if lines:
        parts.append("\n".join(["## Missing rows", "", *lines]))
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
            "Bold: the 95% interval excludes 0. The baseline's column has its value.",
            "",
            *differences_table(cells),
        ]
    )


def differences_table(cells: Sequence[CellSummary]) -> list[str]:
    """Return the table of all methods' differences to the baseline, a row per cell."""
    names = [one.name for one in cells[0].methods] if cells else []
    header = ["cell", "metric", "baseline", *names]
    rows = []
    for cell in cells:
        known = {one.name: one for one in cell.methods}
        rows.append(
            [
                cell.name,
                cell.metric + (" (lower is better)" if cell.minimize else ""),
                cell.baseline or "",
                *(_difference(cell, known[name]) for name in names),
            ]
        )
    return table(header, rows)


def _difference(cell: CellSummary, one: MethodSummary) -> str:
    if one.name == cell.baseline:
        return "" if one.value is None else number_text(one.value.value)
    return "missing" if one.comparison is None else signed(one.comparison.estimate)


def _cell(cell: CellSummary, pictures: Sequence[str]) -> str:
    harms = [harm for harm in HARMS if any(harm in one.harm for one in cell.methods)]
    header = [
        *("method", "rates", cell.metric, f"minus {cell.baseline or 'baseline'}", "better seeds"),
        *("forgetting (change)" if harm == FORGETTING else harm for harm in harms),
        *("full's share", "mean over rates", "worst", "decades", "trials", "minutes", "FLOP"),
    ]
    rows = []
    for one in cell.methods:
        found, curve = one.comparison, one.sensitivity
        rows.append(
            [
                one.name,
                one.rates or "missing",
                estimate_text(one.value),
                "" if one.name == cell.baseline else _compared(found),
                "" if found is None else f"{found.better} of {found.seeds}",
                *(estimate_text(one.harm.get(harm)) for harm in harms),
                "" if one.full_share is None else f"{one.full_share:.1%}",
                *(
                    (number_text(curve.area), number_text(curve.worst), f"{curve.decades:.2g}")
                    if curve
                    else ("", "", "")
                ),
                str(one.trials),
                f"{one.seconds / 60:.1f}",
                f"{one.flops:.2g}",
            ]
        )
    base = "" if cell.base is None else f" Before training: {number_text(cell.base)}."
    direction = "lower" if cell.minimize else "higher"
    parts = [
        f"## {cell.name}",
        f"{cell.about} {cell.metric}: {direction} is better.{base}".strip(),
        "\n".join(table(header, rows)),
    ]
    if cell.controls:
        lines = [
            [method, found.other, signed(found.estimate), f"{found.better} of {found.seeds}"]
            for method, comparisons in cell.controls.items()
            for found in comparisons
        ]
        columns = ["method", "control", f"{cell.metric}: method minus control", "better seeds"]
        parts.append(
            "\n".join(["Controls with the same share of full updates:", "", *table(columns, lines)])
        )
    parts += [
        f"Not beaten in both {cell.metric} and {harm}: {', '.join(front)}."
        for harm in harms
        if (front := front_of(cell, harm))
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(parts)


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
        "- Intervals are 95%. Where scores per question exist, seeds and questions were resampled "
        "together for both methods (pigeonhole bootstrap); else Student's t over seeds.",
        "- Baseline of a cell: of "
        + ", ".join(report["baseline"])
        + ", the best in the first phase.",
        "- Mean over rates, worst: of the first phase, at the chosen ratio of rates; the mean is "
        "over the logarithm of the rate. A failed trial counts as the worst value of the cell.",
        "- Trials, minutes and FLOP include the rate trials. FLOP of training are estimated: 4 per "
        "token and parameter, and 2 per token and trained parameter.",
    ]
    shown = dict.fromkeys([*(cell.metric for cell in cells), *HARMS])
    known = [name for name in shown if any(name in one for one in _metrics(cells))]
    lines += [f"- {names}: {meaning}" for names, meaning in meanings(known)]
    return "\n".join(lines)


def _metrics(cells: Sequence[CellSummary]) -> Iterable[set[str]]:
    for cell in cells:
        yield {cell.metric} | {harm for one in cell.methods for harm in one.harm}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows),
    ]


def number_text(value: float) -> str:
    """Return a number with three decimals; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.3f}"


def estimate_text(found: Estimate | None) -> str:
    """Return a value with its interval."""
    if found is None:
        return "missing"
    if math.isnan(found.low):
        return number_text(found.value)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _compared(found: Comparison | None) -> str:
    return "missing" if found is None else signed(found.estimate)


def signed(found: Estimate) -> str:
    """Return a difference with its interval; bold if the interval excludes 0."""
    if math.isnan(found.low):
        return f"{found.value:+.3f}"
    text = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"**{text}**" if found.differs else text


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
            row |= {
                "full_share": _cell_text(one.full_share),
                "area_over_rates": _cell_text(one.sensitivity.area if one.sensitivity else None),
                "worst_over_rates": _cell_text(one.sensitivity.worst if one.sensitivity else None),
                "trials": one.trials,
                "seconds": round(one.seconds, 1),
                "training_flops": f"{one.flops:.6g}",
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
