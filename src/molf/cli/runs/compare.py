"""`molf compare`: tables of metrics by method, task and model, with intervals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.errors import InputError, system_reason

if TYPE_CHECKING:
    from molf.compare.summary import CellSummary
    from molf.compare.texts import TextTable
    from molf.console import PlainConsole

_SWITCH = Parameter(negative=())


def compare_runs(
    *runs: Path,
    markdown: Annotated[bool, _SWITCH] = False,
    csv: Annotated[bool, _SWITCH] = False,
    output: Annotated[Path | None, Parameter(show_default="none")] = None,
    pareto: Annotated[str | None, Parameter(show_default="forgetting,MAIN METRIC")] = None,
    figures: Annotated[Path | None, Parameter(show_default="none")] = None,
    overwrite: Annotated[bool, _SWITCH] = False,
) -> None:
    """Compare complete runs: means over seeds, paired differences, and which methods are best.

    Args:
        runs: Directories of runs of `molf train`, or one table of runs, results.csv.
        markdown: Print the tables as Markdown.
        csv: Print all values as CSV, a row per task, model, metric and method.
        output: Also write a page of the tables and figures to this file.
        pareto: Two metrics X,Y, the axes of the figures.
        figures: Also write these figures as PNG and SVG, and their values as CSV, in this folder.
        overwrite: Replace a file that is no page of molf.
    """
    if not runs:
        raise InputError("Give directories of runs, or a results.csv; given: none.")
    if markdown and csv:
        raise InputError("markdown and csv are two forms of the tables. Give one of them.")
    if pareto is not None and output is None and figures is None:
        raise InputError("pareto is for a figure. Give --figures FOLDER, or --output FILE.html.")
    from molf.cli.lines import say
    from molf.compare.cells import cells_of
    from molf.compare.pareto import check_pareto
    from molf.compare.runs import read_compared
    from molf.compare.summary import summarise
    from molf.console import PlainConsole
    from molf.job.advice.place import check_figures
    from molf.paths import expanded
    from molf.report.place import file_of_page, write_page

    read, notices = read_compared(runs)
    cells, more = cells_of(read)
    notices += more
    summaries = summarise(cells)
    axes = check_pareto(pareto, summaries)
    place = None if output is None else file_of_page(output, overwrite=overwrite)
    if figures is not None:
        check_figures(figures)
    written = []
    if place is not None:
        from molf.compare.page import render_comparison

        write_page(render_comparison(summaries, notices, axes), place)
        written.append(f"page      {place}")
    if figures is not None:
        count = _write_figures(summaries, axes, expanded(figures))
        written.append(f"figures   {count} files in {expanded(figures)}")
    if markdown or csv:
        from molf.compare.texts import csv_table
        from molf.compare.texts import markdown as as_markdown
        from molf.masking import mask_text
        from molf.report.drawing import csv_text

        text = csv_text(csv_table(summaries)) if csv else as_markdown(summaries, notices)
        sys.stdout.write(mask_text(text))
        sys.stdout.flush()
        for line in (*(notices if csv else ()), *written):
            say("note", line)
        return
    console = PlainConsole()
    _print(console, summaries)
    for line in notices:
        console.lines(f"note      {line}")
    console.lines(*written)


def _print(console: PlainConsole, summaries: Sequence[CellSummary]) -> None:
    from molf.compare.texts import differences_table, legend, meaning_lines, values_table

    for found in summaries:
        for one in filter(None, (values_table(found), differences_table(found))):
            _print_table(console, one)
    console.lines(*(f"  {line}" for line in legend(summaries)))
    found_lines = meaning_lines(summaries)
    width = max((len(names) for names, _ in found_lines), default=0)
    console.lines(*(f"  {names:<{width}}  {text}" for names, text in found_lines))


def _print_table(console: PlainConsole, one: TextTable) -> None:
    from molf.console import new_table

    table = new_table(one.title, *one.columns)
    for name, cells in one.rows:
        table.add_row(name, *(cell.line for cell in cells))
    console.print(table)


def _write_figures(
    summaries: Sequence[CellSummary], axes: tuple[str, str] | None, folder: Path
) -> int:
    from molf.compare.pareto import pareto_figure
    from molf.report.drawing import write_figure

    found = [] if axes is None else [pareto_figure(one, axes) for one in summaries]
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure in filter(None, found):
            written += write_figure(figure, folder, figure.name)
    except OSError as error:
        raise InputError(f"figures {folder} cannot be written: {system_reason(error)}.") from error
    return len(written)
