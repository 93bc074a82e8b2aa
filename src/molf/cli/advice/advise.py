"""`molf advise`: print the assignment that a run's routing suggests, and write it."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from molf.job.advice.choices import CHOICES, check_chosen

if TYPE_CHECKING:
    from molf.job.advice.advice import Advice
    from molf.job.advice.cost import Costs
    from molf.job.record.finished_run import FinishedRun


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
    from molf.job.advice.place import kept_assignment, write_assignment
    from molf.job.record.finished_run import read_run
    from molf.job.record.routing_log import routing_parts

    check_chosen(by, share)
    finished = read_run(run)
    with finished.reading():
        routing_parts(finished.path)
        places = _places(finished, output, page, figures, overwrite=overwrite)
        advice, costs = _advised(finished, share, by, plan=plan)
    kept = None
    if places.keeps:
        kept = kept_assignment(advice.assignment, places.assignment)
    else:
        write_assignment(advice.assignment, places.assignment)
    drawn = _draw(advice, costs, figures, places.page)
    if json:
        from molf.cli.advice.printed import record

        sys.stdout.write(json_module.dumps(record(advice, costs), indent=2) + "\n")
        return
    from molf.cli.advice.printed import print_advice

    written = drawn if places.keeps else [places.assignment, *drawn]
    print_advice(advice, costs, written, kept)


@dataclass(frozen=True)
class _Places:
    """Files to write.

    Attributes:
        assignment: That of the assignment.
        keeps: Whether an earlier one there stays.
        page: That of the page; None without one.
    """

    assignment: Path
    keeps: bool
    page: Path | None


def _places(
    run: FinishedRun,
    output: Path | None,
    page: Path | None,
    figures: Path | None,
    *,
    overwrite: bool,
) -> _Places:
    """Check the places of all files before torch is imported, and return those of two of them."""
    from molf.job.advice.place import advice_place, check_distinct, check_figures

    place = advice_place(run, output, overwrite=overwrite)
    page_file = None
    if page is not None:
        from molf.report.place import file_of_page

        page_file = file_of_page(page, overwrite=overwrite, option="page")
    if figures is not None:
        check_figures(figures)
    check_distinct(output=place, page=page_file, figures=figures)
    # A probe has written it, and it may have been edited: advise then only prints.
    return _Places(place, place.exists() and not overwrite, page_file)


def _advised(
    run: FinishedRun, share: float | None, by: str, *, plan: bool
) -> tuple[Advice, Costs | None]:
    """Return the advice, and its costs if they are wanted and known."""
    from molf.job.libraries import quiet_libraries

    with quiet_libraries():
        from molf.job.advice.advice import advise
        from molf.job.advice.cost import known_costs

        advice = advise(run, share=share, by=by)
        return advice, known_costs(run, advice.assignment) if plan else None


def _draw(
    advice: Advice, costs: Costs | None, figures: Path | None, page: Path | None
) -> list[Path]:
    """Write figures and a page where they are wanted, and return their files."""
    drawn = []
    if figures is not None:
        from molf.job.advice.figures import draw_figures

        drawn = draw_figures(advice, figures)
    if page is not None:
        from molf.report.advice_page import render_advice
        from molf.report.place import write_page

        write_page(render_advice(advice, costs), page)
        drawn.append(page)
    return drawn
