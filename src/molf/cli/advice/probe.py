"""`molf probe`: route a few steps, and print the assignment by their decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.advice.choices import CHOICES, check_chosen
from molf.job.settings.probe import ProbeSettings
from molf.job.settings.settings import DATA, OUTPUT


def probe_model(
    settings: ProbeSettings = ProbeSettings(),  # noqa: B008 (frozen)
    *,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
    by: Annotated[str, Parameter(choices=CHOICES, group=OUTPUT)] = "wins",
    share: Annotated[float | None, Parameter(show_default="by the wins", group=OUTPUT)] = None,
    figures: Annotated[Path | None, Parameter(show_default="none", group=OUTPUT)] = None,
    plan: Annotated[bool, Parameter(group=OUTPUT)] = True,
) -> None:
    """Route a few steps in little memory; print and write the assignment by their decisions.

    Args:
        settings: The options of `molf train`; no model is kept.
        config: A YAML file of these options, or a recipe by name; the command line has precedence.
        by: Layers in full. wins: full won most steps; score: the mean margin of full is above 0.
        share: Instead, this share of the routed layers in full: those where full leads most.
        figures: Also draw the evidence, as PNG files in this folder.
        plan: Plan memory and arithmetic of the assignment and of other methods.
    """
    from molf.job.advice.place import check_figures
    from molf.job.ahead.probe import probe

    check_chosen(by, share)
    if figures is not None:
        check_figures(figures)
    result = probe(settings, share=share, by=by)
    from molf.cli.advice.printed import print_advice, print_probe
    from molf.streams import result_on_disk

    with result_on_disk(f"The probe in {result.directory} is complete"):
        costs = None
        if plan:
            from molf.job.advice.cost import known_costs

            costs = known_costs(result.advice.run, result.advice.assignment)
        drawn = []
        if figures is not None:
            from molf.job.advice.figures import draw_figures

            drawn = draw_figures(result.advice, figures)
        print_advice(result.advice, costs, [result.assignment, *drawn])
        print_probe(result, settings)
