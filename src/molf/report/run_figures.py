"""Write the figures of runs as files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from molf.errors import InputError, system_reason
from molf.report.drawing import write_figure, write_table
from molf.report.figures import Cell, Table, plain
from molf.report.page import sections_of
from molf.report.run_data import RunData


def write_figures(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG, and its values as CSV; return the paths.

    Args:
        runs: The runs; the files of several begin with the name of their run.
        folder: Where to write them; created if it is missing.

    Raises:
        InputError: They cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            prefix = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', run.name)}-" if len(runs) > 1 else ""
            for figure in (one for section in sections_of(run) for one in section.figures):
                written += write_figure(figure, folder, f"{prefix}{figure.name}")
            for name, table in _metrics(run):
                written.append(write_table(table, folder / f"{prefix}{name}.csv"))
    except OSError as error:
        raise InputError(f"figures {folder} cannot be written: {system_reason(error)}.") from error
    return written


def _metrics(run: RunData) -> Iterator[tuple[str, Table]]:
    for number, task in enumerate(run.evaluated):
        rows: list[tuple[Cell, ...]] = [
            (row.name, when, plain(one.value), plain(one.low), plain(one.high), one.count)
            for row in task.metrics.rows
            for when, one in (("before", row.before), ("after", row.after))
            if one is not None
        ]
        columns = ("metric", "when", "value", "low", "high", "count")
        yield (
            "metrics" if len(run.evaluated) == 1 else f"metrics-{number}",
            Table(columns, tuple(rows)),
        )
