"""`molf routing`: print the routing decisions of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def show_routing(
    run: Path,
    /,
    *,
    jsonl: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Print which experts won, in total, per kind of module and per layer.

    Args:
        run: Directory of a run of `molf train`.
        jsonl: Print every step as a line of JSON at full precision instead.
    """
    run = run.expanduser()
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
    console.print(f"{run}: {shares.steps} steps, {len(shares.by_layer)} layers")
    table = new_table("Share of updates won", "layers", *shares.total)
    for section in ({"all": shares.total}, shares.by_kind, shares.by_layer):
        for name, row in section.items():
            table.add_row(name, *(f"{row[expert]:.1%}" for expert in shares.total))
        table.add_section()
    console.print(table)
    # The routing may have been copied without the run.
    if is_run(run) and (meaning := read_run(run).routing_meaning):
        console.print(meaning, highlight=False, soft_wrap=True)
