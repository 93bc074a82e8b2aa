"""`molf advise`: print the assignment that a run's routing suggests, and write it."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.advice.choices import CHOICES, check_chosen


def advise_run(
    run: Path,
    /,
    *,
    by: Annotated[str, Parameter(choices=CHOICES)] = "wins",
    share: Annotated[float | None, Parameter(show_default="by the wins")] = None,
    output: Annotated[Path | None, Parameter(show_default="RUN/assignment.yaml")] = None,
    overwrite: Annotated[bool, Parameter(negative=())] = False,
    figures: Annotated[Path | None, Parameter(show_default="none")] = None,
    page: Annotated[Path | None, Parameter(show_default="none")] = None,
    plan: bool = True,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Print and write the assignment that the routing of a run suggests, with its evidence.

    Args:
        run: Directory of a run of `molf train` with molf or molf-e, or of `molf probe`.
        by: Layers in full. wins: full won most steps; score: the mean margin of full is above 0.
        share: Instead, this share of the routed layers in full: those where full leads most.
        output: File of the assignment, which `molf train --method hybrid --assignment` takes.
        overwrite: Replace that file, and a file of page that is no page of molf. Without it and
            output, an assignment.yaml in RUN is kept.
        figures: Also draw the evidence, as PNG files in this folder.
        page: Also write tables, figures and the assignment of every layer as a page to this file.
        plan: Plan memory and arithmetic of the assignment and of other methods.
        json: Print everything as JSON, sizes in bytes.
    """
    from molf.job.advice.place import (
        advice_place,
        check_distinct,
        check_figures,
        kept_assignment,
        write_assignment,
    )
    from molf.job.record.finished_run import read_run
    from molf.job.record.routing_log import routing_parts

    check_chosen(by, share)
    finished = read_run(run)
    with finished.reading():
        routing_parts(finished.path)
        place = advice_place(finished, output, overwrite=overwrite)
        # A probe has written it, and it may have been edited: advise then only prints.
        keeps = place.exists() and not overwrite
        page_file = None
        if page is not None:
            from molf.report.place import file_of_page

            page_file = file_of_page(page, overwrite=overwrite, option="page")
        if figures is not None:
            check_figures(figures)
        check_distinct(output=place, page=page_file, figures=figures)
        from molf.job.libraries import quiet_libraries

        with quiet_libraries():
            from molf.job.advice.advice import advise

            advice = advise(finished, share=share, by=by)
            costs = None
            if plan:
                from molf.job.advice.cost import known_costs

                costs = known_costs(finished, advice.assignment)
    kept = kept_assignment(advice.assignment, place) if keeps else None
    if not keeps:
        write_assignment(advice.assignment, place)
    drawn = []
    if figures is not None:
        from molf.job.advice.figures import draw_figures

        drawn = draw_figures(advice, figures)
    if page_file is not None:
        from molf.report.advice_page import render_advice
        from molf.report.place import write_page

        write_page(render_advice(advice, costs), page_file)
        drawn.append(page_file)
    if json:
        from molf.cli.advice.printed import record

        sys.stdout.write(json_module.dumps(record(advice, costs), indent=2) + "\n")
        return
    from molf.cli.advice.printed import print_advice

    print_advice(advice, costs, drawn if keeps else [place, *drawn], kept)
