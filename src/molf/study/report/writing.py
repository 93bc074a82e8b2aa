"""Write the report of a study: Markdown, a page, figures, and its summary as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molf.disk.files import replacing_file, write_text
from molf.measure.estimate_texts import table
from molf.measure.estimates import Estimate
from molf.report.document import Marked, Part, ShownTable, render_parts
from molf.report.place import write_page
from molf.study.choice import HARMS
from molf.study.report.parts import parts_of
from molf.study.report.records import PAGE, REPORT_FILE, SUMMARY, Records, read_records
from molf.study.report.summary import CellSummary, summarise


def write_report(folder: Path, *, figures: bool = True) -> Path:
    """Write the report of a stored study beside its records; return the path of its Markdown.

    The page needs no matplotlib: it draws its figures itself.

    Args:
        folder: A folder with the records; nothing else is read.
        figures: Whether to draw figures as files, which needs matplotlib.

    Raises:
        InputError: The folder holds no stored study, or matplotlib is missing.
    """
    records = read_records(folder)
    cells = summarise(records)
    pictures: dict[str, list[str]] = {}
    if figures:
        from molf.study.report.figures import draw_figures

        pictures = draw_figures(folder, cells)
    parts = parts_of(records, cells)
    write_text(folder / REPORT_FILE, report_text(records, parts, pictures))
    title, about = str(records.outline["study"]), str(records.outline.get("about") or "")
    write_page(render_parts(title, parts, about=about), folder / PAGE)
    _write_summary(folder / SUMMARY, cells)
    return folder / REPORT_FILE


def report_text(records: Records, parts: Sequence[Part], pictures: dict[str, list[str]]) -> str:
    """Return the report as Markdown.

    Args:
        records: The stored study.
        parts: Its parts.
        pictures: Names of figures by cell.
    """
    outline = records.outline
    blocks = [f"# {outline['study']}", str(outline.get("about") or "")]
    for part in parts:
        blocks += [f"## {part.title}", *part.text]
        for one in part.tables:
            blocks += [one.text, "\n".join(_table(one))]
        blocks.append("\n".join(f"- {line}" for line in part.lines))
        drawn = pictures.get(part.title, [])
        blocks += [f"![{name.removesuffix('.png')}]({name})" for name in drawn]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(one: ShownTable) -> list[str]:
    return table(one.columns, [[_text(cell) for cell in row] for row in one.rows])


def _text(cell: str | Marked) -> str:
    if isinstance(cell, str):
        return cell
    text = " ".join(filter(None, (cell.value, cell.more)))
    return f"**{text}**" if cell.is_strong else text


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
