"""The page of a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from molf.compare.pareto import pareto_figure
from molf.compare.summary import BEST, CLOSE, CellSummary
from molf.compare.texts import (
    MARKS,
    TextCell,
    TextTable,
    differences_table,
    legend,
    meaning_lines,
    values_table,
)
from molf.report.document import Marked, Part, ShownTable, render_parts


def render_comparison(
    summaries: Sequence[CellSummary], notices: Sequence[str], pareto: tuple[str, str] | None
) -> str:
    """Return the page: the tables of each cell and its figure.

    Args:
        summaries: The comparison.
        notices: Lines about values that the tables lack.
        pareto: The two metrics of the figures; None for none.
    """
    parts = []
    for found in summaries:
        figure = None if pareto is None else pareto_figure(found, pareto)
        tables = filter(None, (values_table(found), differences_table(found)))
        parts.append(
            Part(
                found.cell.name,
                tables=tuple(_shown(one, found) for one in tables),
                figures=() if figure is None else (figure,),
            )
        )
    lines = [*legend(summaries), *(f"{x}: {text}" for x, text in meaning_lines(summaries))]
    parts.append(Part("How to read it", lines=tuple(lines)))
    runs = sum(len(seeds) for found in summaries for seeds in found.cell.methods.values())
    methods = dict.fromkeys(name for found in summaries for name in found.cell.methods)
    facts = [("Runs", f"{runs:,}"), ("Methods", f"{len(methods):,}")]
    return render_parts("Comparison of runs", parts, notices=notices, facts=facts)


def _shown(one: TextTable, found: CellSummary) -> ShownTable:
    is_values = one.title == found.cell.name
    rows = tuple((name, *map(_marked, cells)) for name, cells in one.rows)
    text = (
        f"{MARKS[BEST]} best mean, {MARKS[CLOSE]} not distinguishable from it; n: seeds."
        if is_values
        else "Paired by seed, and by question where scores of questions exist."
    )
    title = "Means over seeds" if is_values else "Difference to the best"
    return ShownTable(title, text, one.columns, rows)


def _marked(cell: TextCell) -> str | Marked:
    value = f"{cell.value} {MARKS.get(cell.place, '')}".strip()
    return Marked(value, cell.interval, is_strong=cell.place == BEST)
