"""Print advice: the evidence by kind and depth, the assignment, and its cost."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from molf.console import PlainConsole, new_table
from molf.job.advice.doubts import doubts
from molf.masking import mask
from molf.planning.devices import show_bytes
from molf.shown import counted

if TYPE_CHECKING:  # imports torch
    from molf.job.advice.advice import Advice
    from molf.job.advice.cost import Costs
    from molf.job.advice.routed import Group
    from molf.job.probe import Probe

_NAMES = {"fft": "full", "molf": "MoLF", "lora": "LoRA", "hybrid": "assigned"}
_MOST_DIFFERING = 8  # names of layers in one line


def print_advice(
    advice: Advice, costs: Costs | None, written: Sequence[Path], kept: str | None = None
) -> None:
    """Print it to standard output; `written` are the files of it, `kept` a line about one kept."""
    console = PlainConsole()
    run = advice.run
    console.lines(
        f"{run.path}: {run.method}, score {advice.score}, {counted(advice.steps, 'decision')} for "
        f"each of {counted(len(advice.layers), 'layer')}, lora_lr {advice.rate_ratio:g} times lr"
    )
    console.print(_evidence("By kind of projection", "kind", advice.by_kind, advice))
    if len(advice.by_depth) > 1:
        console.print(_evidence("By depth", "layer", advice.by_depth, advice))
    console.lines(
        "won: mean share of the decisions. flips: changes of winner per layer. last: median step "
        "of the last flip. to: layers assigned.",
        *_legend(advice),
        *_summary(advice),
        "",
        *_thin(advice),
        "",
        f"Assignment: {advice.assignment}.",
    )
    if costs is not None:
        console.print(_costs(costs))
        console.lines(
            f"Planned for {costs.workload.batch_size} x {costs.workload.length} tokens in "
            f"{costs.workload.dtype} on {costs.workload.device}. arithmetic: operations of the "
            "linear layers, forward and backward, computed from their shapes; it is no measured "
            "time."
        )
    console.lines(*([] if kept is None else [kept]), *(f"written   {path}" for path in written))


def print_probe(result: Probe) -> None:
    """Print time, memory and the next command of a probe to standard output."""
    steps = counted(result.advice.steps, "decision")
    PlainConsole().lines(
        f"time      {result.seconds:.1f} s for {steps} per layer",
        f"memory    {show_bytes(result.peak_memory_bytes)} at most ({result.peak_memory_of})",
        f"run       {result.directory}",
        f"next      molf train --method hybrid --assignment {shlex.quote(str(result.directory))}",
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


def _evidence(title: str, first: str, groups: Iterable[Group], advice: Advice) -> Table:
    # Narrow columns: the table has to fit 80 characters.
    names = {"full": "full", **dict(zip(advice.lora_experts, advice.lora_names, strict=True))}
    shown = [name for name in names if name in advice.experts]
    if len(shown) == 2:  # the other share follows from it
        shown = shown[:1]
    table = new_table(title, first)
    for name in (
        "layers",
        *(f"won {names[name]}" for name in shown),
        *(("margin",) if advice.has_full else ()),
        *("flips", "last"),
        *(("by shape", "differ") if advice.has_full else ()),
        *(f"to {names[name]}" for name in shown),
    ):
        table.add_column(name, justify="right", max_width=max(map(len, name.split())))
    groups = tuple(groups)
    table.columns[0].min_width = max(len(group.name) for group in groups)
    for group in groups:
        cells = [group.name, str(len(group.layers))]
        cells += [f"{group.won(name):.0%}" for name in shown]
        if group.margin is not None:
            cells.append(f"{group.margin:+.3f}")
        cells += [f"{group.changes:.1f}", f"{group.settled:g}"]
        if advice.has_full:
            cells += [str(group.full_by_shape), str(group.differing)]
        table.add_row(*cells, *(str(advice.assigned_to(group, names[name])) for name in shown))
    return table


def _legend(advice: Advice) -> list[str]:
    if not advice.has_full:
        return []
    return [
        "margin: (full - LoRA) / (full + LoRA) of the scores, mean. by shape: layers in which "
        "shape, scaling and rates alone predict full. differ: layers with another winner than that."
    ]


def _summary(advice: Advice) -> list[str]:
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


def _thin(advice: Advice) -> list[str]:
    found = doubts(advice)
    if not found:
        return [
            "No sign of thin evidence. Nothing here shows that the assignment is better than a "
            "random one with the same share in full."
        ]
    return ["The evidence is thin:", *(f"  {line}" for line in found)]


def _costs(costs: Costs) -> Table:
    table = new_table("Cost", "", "trained", "peak memory", "of full", "arithmetic", "of full")
    full = costs.of("fft")
    for one in costs.methods:
        table.add_row(
            _NAMES[one.method],
            f"{one.trained:,}",
            show_bytes(one.peak),
            f"{one.peak / full.peak:.2f}",
            f"{one.operations / 1e6:,.4g} M/token",
            f"{one.operations / full.operations:.2f}",
        )
    return table
