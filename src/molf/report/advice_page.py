"""The page of `molf advise`: evidence, assignment and cost, with the figures of the routing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from molf.job.advice.texts import (
    costs_table,
    evidence_tables,
    layers_table,
    legend,
    planned_for,
    summary,
    thin,
)
from molf.report.document import Part, render_parts, shown_table
from molf.report.routing_figures import routing_section
from molf.report.run_data import read_run_data

if TYPE_CHECKING:  # imports torch
    from molf.job.advice.advice import Advice
    from molf.job.advice.cost import Costs


def render_advice(advice: Advice, costs: Costs | None) -> str:
    """Return the page.

    Args:
        advice: The advice.
        costs: The planned costs; None if they were not planned.

    Raises:
        InputError: The run was deleted meanwhile.
    """
    data = read_run_data(advice.run.path)
    first, *more = thin(advice)
    routing = routing_section(data)
    parts = [
        Part(
            "Assignment",
            text=(f"{advice.assignment}.", *summary(advice), first),
            lines=tuple(line.strip() for line in more),
        ),
        Part(
            "Evidence",
            text=tuple(legend(advice)),
            tables=tuple(shown_table(one) for one in evidence_tables(advice)),
        ),
    ]
    if costs is not None:
        table = shown_table(costs_table(costs), planned_for(costs))
        parts.append(Part("Cost", tables=(table,)))
    if routing is not None:
        parts.append(Part(routing.title, text=routing.text, figures=routing.figures))
    parts.append(Part("Layers", tables=(shown_table(layers_table(advice)),)))
    facts = [
        ("Run", data.name),
        ("Method", advice.run.method),
        ("Score", advice.score),
        ("Layers", f"{len(advice.layers):,}"),
        ("Decisions per layer", f"{advice.steps:,}"),
        ("LoRA rate / rate of full", f"{advice.rate_ratio:g}"),
    ]
    return render_parts(f"Advice: {data.name}", parts, facts=facts)
