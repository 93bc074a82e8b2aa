"""`molf routing`: print the routing decisions of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.paths import expanded
from molf.shown import as_line, counted

if TYPE_CHECKING:
    from molf.console import PlainConsole

_COLORS = ("red", "blue", "green", "magenta", "yellow", "cyan")  # as in the page


def show_routing(
    run: Path,
    /,
    *,
    layers: Annotated[bool, Parameter(negative=())] = False,
    jsonl: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Print which experts won, in total and per kind of module, and a map of layers and steps.

    Args:
        run: Directory of a run of `molf train`, or of `molf.RoutingCallback`.
        layers: Print the shares of every layer instead of the map.
        jsonl: Print every step as a line of JSON at full precision instead.
    """
    run = expanded(run)
    if jsonl:
        from molf.job.record.routing_log import iter_steps

        for step in iter_steps(run):
            sys.stdout.write(json.dumps(step) + "\n")
        sys.stdout.flush()
        return
    from molf.console import PlainConsole, new_table
    from molf.job.record.finished_run import read_run
    from molf.job.record.ownership import is_run
    from molf.job.record.routing_shares import routing_shares

    shares = routing_shares(run)
    console = PlainConsole()
    console.print(
        f"{run}: {counted(shares.steps, 'step')}, {counted(len(shares.by_layer), 'layer')}"
    )
    table = new_table("Share of updates won", "layers", *shares.total)
    sections = ({"all": shares.total}, shares.by_kind, shares.by_layer if layers else {})
    for section in filter(None, sections):
        for name, row in section.items():
            table.add_row(name, *(f"{row[expert]:.1%}" for expert in shares.total))
        table.add_section()
    console.print(table)
    if not layers:
        _print_map(console, run)
    # The routing may have been copied without the run.
    if is_run(run) and (meaning := read_run(run).routing_meaning):
        console.print(meaning, highlight=False, soft_wrap=True)


def _print_map(console: PlainConsole, run: Path) -> None:
    """Print the most frequent winner by layer and step, in colour on a terminal."""
    from rich.text import Text

    from molf.masking import mask_text
    from molf.report.small_map import small_map

    found = small_map(run)
    colors = {mark: _COLORS[number % 6] for number, mark in enumerate(found.marks.values())}
    width = max(len(name) for name, _ in found.rows)
    console.lines("", found.legend)
    for name, cells in found.rows:
        line = Text(f"{as_line(mask_text(name)):<{width}}  ")
        for cell in cells:
            line.append(cell, style=colors.get(cell, "bright_black"))
        console.print(line, soft_wrap=True)
