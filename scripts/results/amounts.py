"""Numbers of trials and hours, metrics of the base, shares in full, and costs."""

from __future__ import annotations

from statistics import fmean, median

from molf.measure.estimate_texts import number_text
from molf.study.definition import REPORT
from molf.study.report.records import is_complete, total_of
from molf.study.report.summary import CellSummary
from results.stored import NO_ROWS, Study


def untrained(study: Study) -> str:
    """Return the metric of the base, by cell."""
    found = [f"`{one.name}` {number_text(one.base)}" for one in study.cells if one.base is not None]
    return ", ".join(found) or NO_ROWS


def full_range(study: Study, method: str) -> str:
    """Return the smallest and the largest share in full of a method over the cells."""
    shares = [one.full_share for _, one in study.of(method) if one.full_share is not None]
    ends = dict.fromkeys(f"{end:.0%}" for end in (min(shares), max(shares))) if shares else ()
    return " to ".join(ends) or NO_ROWS


def memory(study: Study, method: str, other: str) -> str:
    """Return the peak memory of a run as a multiple of another method's.

    The median of a cell, and the mean over cells. Rows of different hours and loads have comparable
    memory, but no comparable times.
    """
    ratios = [
        median(mine) / median(theirs)
        for cell in study.cells
        if (mine := _column(study, cell, method, "peak_memory_bytes"))
        and (theirs := _column(study, cell, other, "peak_memory_bytes"))
    ]
    return f"{fmean(ratios):.2f} times the peak memory of `{other}`" if ratios else NO_ROWS


def _column(study: Study, cell: CellSummary, method: str, column: str) -> list[float]:
    return [
        row[column]
        for row in study.rows
        if (row["cell"], row["method"], row["phase"]) == (cell.name, method, REPORT)
        and is_complete(row)
        and row.get(column)
    ]


def trials(study: Study) -> str:
    """Return the number of ended trials."""
    return str(len(study.rows))


def shared(study: Study, other: str) -> str:
    """Return the number of trials that are also trials of another study: the same trainings."""
    known = {(row["key"], row.get("started")) for row in Study(study.folder.parent / other).rows}
    return str(sum((row["key"], row.get("started")) in known for row in study.rows))


def hours(study: Study) -> str:
    """Return the hours of all workers; a shared training or probe counts once."""
    return f"{total_of(study.rows, 'seconds', 'probe_seconds') / 3600:.1f}"


def missing(study: Study) -> str:
    """Return the missing and failed rows."""
    if not study.planned:
        return NO_ROWS
    lines = [f"- {name}: all rows" for name in study.without_rows]
    for cell in study.cells:
        for one in cell.methods:
            lacking = list(one.missing)
            if one.failed_seeds:
                lacking.append(f"failed seeds {', '.join(map(str, one.failed_seeds))}")
            if lacking:
                lines.append(f"- {cell.name}, {one.name}: {'; '.join(lacking)}")
    return "\n".join(lines) or "none"
