"""`molf report`: write the page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.errors import InputError

if TYPE_CHECKING:
    from molf.report.run_data import RunData


def report_runs(
    *runs: Path,
    output: Annotated[Path | None, Parameter(show_default="RUN/report.html")] = None,
    figures: Annotated[Path | None, Parameter(show_default="none")] = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    watch: Annotated[bool, Parameter(negative=())] = False,
    port: Annotated[int, Parameter(show_default="a free one")] = 0,
) -> None:
    """Write one HTML page of charts, tables and samples, which needs no network.

    Args:
        runs: Directories of runs of `molf train`, or of evaluations of `molf eval`.
        output: File of the page; several runs need one.
        figures: Also write each figure as PNG and SVG, and its values as CSV, in this folder.
        overwrite: Replace a file that is no page of molf.
        watch: While a run is running, serve the page on this machine; write it at the end.
        port: Port of watch.
    """
    if not runs:
        raise InputError("Give the directory of a run, or several; given: none.")
    from molf.console import PlainConsole
    from molf.job.advice.place import check_figures
    from molf.paths import expanded
    from molf.report.build import read_runs
    from molf.report.place import page_place, write_page

    places = [expanded(run) for run in runs]
    read = read_runs(places)
    place = page_place(places, output, overwrite=overwrite)
    if figures is not None:
        check_figures(figures)
    from molf.report.page import render

    if watch:
        read = _watch(places, port)
    write_page(render(read), place)
    console = PlainConsole()
    for run in read:
        console.lines(f"{run.name}: {run.status}", *(f"  {line}" for line in run.notices))
    console.lines(f"page      {place}")
    if figures is not None:
        from molf.report.run_figures import write_figures

        written = write_figures(read, expanded(figures))
        console.lines(f"figures   {len(written)} files in {expanded(figures)}")


def _watch(places: Sequence[Path], port: int) -> list[RunData]:
    """Serve the page until no run is running; Ctrl-C ends it before."""
    from molf.console import PlainConsole
    from molf.report.build import read_runs
    from molf.report.run_data import RUNNING
    from molf.report.watching import Watcher

    console = PlainConsole()
    with Watcher(places, port) as watcher:
        runs = read_runs(places)
        if all(run.status != RUNNING for run in runs):
            console.lines("watch     no run is running")
            return runs
        console.lines(f"watch     {watcher.address} (Ctrl-C ends it)")
        try:
            return watcher.wait()
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt:  # SIGTERM and SIGHUP end the command
                raise
            return read_runs(places)
