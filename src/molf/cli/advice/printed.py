"""Print advice: the evidence by kind and depth, the assignment, and its cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from molf.amounts import binary_size, duration
from molf.cli.advice.training import training_command
from molf.console import PlainConsole, new_table
from molf.job.advice.doubts import doubts
from molf.job.advice.texts import (
    costs_table,
    evidence_tables,
    legend,
    origin,
    planned_for,
    summary,
    thin,
)
from molf.masking import mask
from molf.shown import TextTable, counted

if TYPE_CHECKING:  # imports torch
    from molf.job.advice.advice import Advice
    from molf.job.advice.cost import Costs
    from molf.job.ahead.probe import Probe
    from molf.job.settings.probe import ProbeSettings


def print_advice(
    advice: Advice, costs: Costs | None, written: Sequence[Path], kept: str | None = None
) -> None:
    """Print it to standard output; `written` are the files of it, `kept` a line about one kept."""
    console = PlainConsole()
    console.lines(f"{advice.run.path}: {origin(advice)}")
    for table in evidence_tables(advice):
        console.print(_narrow(table))
    console.lines(
        *legend(advice),
        *summary(advice),
        "",
        *thin(advice),
        "",
        f"Assignment: {advice.assignment}.",
    )
    if costs is not None:
        console.print(_table(costs_table(costs)))
        console.lines(planned_for(costs))
    console.lines(*([] if kept is None else [kept]), *(f"written   {path}" for path in written))


def print_probe(result: Probe, settings: ProbeSettings) -> None:
    """Print time, memory and the next command of a probe to standard output."""
    words = training_command(vars(settings), result.directory)
    steps = counted(result.advice.steps, "decision")
    PlainConsole().lines(
        f"time      {duration(result.seconds)} for {steps} per layer",
        f"memory    {binary_size(result.peak_memory_bytes)} at most ({result.peak_memory_of})",
        f"run       {result.directory}",
        f"next      {shlex.join(words)}",
    )


def record(advice: Advice, costs: Costs | None) -> dict[str, Any]:
    """Return everything as plain values."""
    values = {
        "run": str(advice.run.path),
        "method": advice.run.method,
        "score": advice.score,
        "decisions": advice.steps,
        "lora_lr_over_lr": advice.rate_ratio,
        "assignment": str(advice.assignment),
        "full_share": advice.assignment.share,
        "differing_from_shape": advice.differing if advice.has_full else None,
        "settled": {str(share): advice.settled_by(share) for share in (0.1, 0.3, 0.5)},
        "doubts": doubts(advice),
        "layers": [advice.record(one) for one in advice.layers],
        "costs": None if costs is None else [one.record() for one in costs.methods],
    }
    made: dict[str, Any] = mask(values)
    return made


def _narrow(found: TextTable) -> Table:
    # Narrow columns: the table has to fit 80 characters.
    table = new_table(found.title, found.columns[0])
    for name in found.columns[1:]:
        table.add_column(name, justify="right", max_width=max(map(len, name.split())))
    table.columns[0].min_width = max(len(row[0]) for row in found.rows)
    for row in found.rows:
        table.add_row(*row)
    return table


def _table(found: TextTable) -> Table:
    table = new_table(found.title, *found.columns)
    for row in found.rows:
        table.add_row(*row)
    return table
