"""Advice as tables and sentences, for the terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from molf.amounts import binary_size
from molf.core.assignment.assigned import FULL, LORA
from molf.job.advice.doubts import doubts
from molf.shown import TextTable, counted

if TYPE_CHECKING:  # imports torch
    from molf.core.assignment.assigned import AssignedLayer, Treatment
    from molf.job.advice.advice import Advice
    from molf.job.advice.cost import Costs
    from molf.job.advice.routed import Group

_NAMES = {"fft": "full", "molf": "MoLF", "lora": "LoRA", "hybrid": "assigned"}
_MOST_DIFFERING = 8  # names of layers in one line


def origin(advice: Advice) -> str:
    """Return the run that the advice is of, in one line without its path."""
    return (
        f"{advice.run.method}, score {advice.score}, {counted(advice.steps, 'decision')} for each "
        f"of {counted(len(advice.layers), 'layer')}, lora_lr {advice.rate_ratio:g} times lr"
    )


def evidence_tables(advice: Advice) -> list[TextTable]:
    """Return the evidence by kind of projection and by depth."""
    tables = [_evidence("By kind of projection", "kind", advice.by_kind, advice)]
    if len(advice.by_depth) > 1:
        tables.append(_evidence("By depth", "layer", advice.by_depth, advice))
    return tables


def _evidence(title: str, first: str, groups: Iterable[Group], advice: Advice) -> TextTable:
    names = advice.shown_names
    shown = [name for name in names if name in advice.experts]
    if len(shown) == 2:  # the other share follows from it
        shown = shown[:1]
    columns = (
        *(first, "layers", *(f"won {names[name]}" for name in shown)),
        *(("margin",) if advice.has_full else ()),
        *("flips", "last"),
        *(("by shape", "differ") if advice.has_full else ()),
        *(f"to {names[name]}" for name in shown),
    )
    rows = []
    for group in groups:
        cells = [group.name, str(len(group.layers))]
        cells += [f"{group.won(name):.0%}" for name in shown]
        if group.margin is not None:
            cells.append(f"{group.margin:+.3f}")
        cells += [f"{group.changes:.1f}", f"{group.settled:g}"]
        if advice.has_full:
            cells += [str(group.full_by_shape), str(group.differing)]
        rows.append((*cells, *(str(advice.assigned_to(group, name)) for name in shown)))
    return TextTable(title, columns, tuple(rows))


def layers_table(advice: Advice) -> TextTable:
    """Return a row per layer: its evidence and its assignment."""
    columns = ("layer", "shape", "won full", "margin", "flips", "last", "by shape", "assigned to")
    rows = []
    for one in advice.layers:
        assigned, margin = advice.assigned(one), one.evidence.margin
        rows.append(
            (
                one.name,
                " x ".join(map(str, assigned.shape)),
                f"{one.evidence.share(FULL):.0%}" if advice.has_full else "",
                "" if margin is None else f"{margin:+.3f}",
                str(one.evidence.changes),
                str(one.settled),
                "" if one.by_shape is None else _treatment(one.by_shape),
                _treatment(assigned),
            )
        )
    return TextTable("Layers", columns, tuple(rows))


def _treatment(found: AssignedLayer | Treatment) -> str:
    return f"r {found.r}" if found.train == LORA else found.train


def legend(advice: Advice) -> list[str]:
    """Return the meaning of the columns."""
    first = (
        "won: mean share of the decisions. flips: changes of winner per layer. last: median step "
        "of the last flip, 1 without any. to: layers assigned."
    )
    if not advice.has_full:
        return [first]
    return [
        first,
        "margin: (full - LoRA) / (full + LoRA) of the scores, mean. by shape: layers in which "
        "shape, scaling and rates alone predict full. differ: layers with another winner than "
        "that.",
    ]


def summary(advice: Advice) -> list[str]:
    """Return when the layers were decided, and how the log compares with shape alone."""
    lines = [
        f"Decided early: {advice.settled_by(0.1):.0%} of the layers kept their winner after the "
        f"first tenth of the steps, {advice.settled_by(0.3):.0%} after three tenths, "
        f"{advice.settled_by(0.5):.0%} after half."
    ]
    if not advice.has_full:
        return lines
    ratios = sorted(one.tips_at for one in advice.layers if one.tips_at is not None)
    differing = [one.name for one in advice.layers if one.differs]
    shown = ", ".join(differing[:_MOST_DIFFERING])
    more = len(differing) - _MOST_DIFFERING
    names = f": {shown}{f' and {more} more' if more > 0 else ''}" if differing else ""
    return [
        *lines,
        f"Close calls: {advice.close} of {len(advice.layers)} layers have a margin within "
        f"0.05 of 0; {advice.late} changed their winner in the second half of the "
        "steps.",
        f"Shape, scaling and rates alone predict full below a lora_lr of {ratios[0]:.2g} to "
        f"{ratios[-1]:.2g} times lr, by layer; the log differs in {len(differing)} of "
        f"{counted(len(advice.layers), 'layer')}{names}.",
    ]


def thin(advice: Advice) -> list[str]:
    """Return the reasons why the evidence is thin, or that there is none."""
    found = doubts(advice)
    if not found:
        return [
            "No sign of thin evidence. Nothing here shows that the assignment is better than a "
            "random one with the same share in full."
        ]
    return ["The evidence is thin:", *(f"  {line}" for line in found)]


def costs_table(costs: Costs) -> TextTable:
    """Return memory and arithmetic of the assignment beside other methods."""
    full = costs.of("fft")
    rows = tuple(
        (
            _NAMES[one.method],
            f"{one.trained:,}",
            binary_size(one.peak),
            f"{one.peak / full.peak:.2f}",
            f"{one.operations / 1e6:,.4g} M/token",
            f"{one.operations / full.operations:.2f}",
        )
        for one in costs.methods
    )
    columns = ("", "trained", "peak memory", "of full", "arithmetic", "of full")
    return TextTable("Cost", columns, rows)


def planned_for(costs: Costs) -> str:
    """Return the training that the costs were planned for."""
    return (
        f"Planned for {costs.workload.batch_size} x {costs.workload.length} tokens in "
        f"{costs.workload.dtype} on {costs.workload.device}. arithmetic: operations of the "
        "linear layers, forward and backward, computed from their shapes; it is no measured "
        "time."
    )
