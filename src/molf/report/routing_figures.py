"""Figures of the routing: winners and margins by layer and time, shares, flips, kinds, depths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from molf.core.assignment.assigned import FULL
from molf.job.advice.routed import Group, RoutedLayer, RoutedLayers
from molf.job.record.routing_meaning import has_changes
from molf.report.figures import Bars, Cell, Figure, Heat, Section, Series, Table, lines, plain
from molf.report.routing_data import FACTORS, RoutingData
from molf.report.run_data import RunData
from molf.shown import counted, listed

_NAMED = 6  # layers in a sentence


def routing_section(data: RunData) -> Section | None:
    """Return the figures of the routing; None without routing."""
    routing = data.routing
    if routing is None:
        return None
    if routing.routed is None:
        return Section("routing", "Routing", (), ("No expert has won anything yet.",))
    recorded = data.recorded.get("routing")
    meaning = str(recorded.get("meaning") or "") if isinstance(recorded, dict) else ""
    # At its end a run records the changes in a sentence of its own.
    changes = "" if has_changes(meaning) else _changes(routing, routing.routed)
    text = tuple(filter(None, (meaning, changes, _predicted(routing, routing.routed))))
    return Section("routing", "Routing", tuple(_figures(routing, routing.routed)), text)


def _changes(routing: RoutingData, routed: RoutedLayers) -> str:
    """Return the number of changes of winner, and the last of them, in a sentence."""
    flips = sum(one.evidence.changes for one in routed.layers)
    last = max((one.evidence.last_change or 0) for one in routed.layers)
    unchanged = sum(not one.evidence.changes for one in routed.layers)
    when = f", the last in step {last:,} of {routing.last[-1]:,}" if flips else ""
    return (
        f"{counted(flips, 'flip')} (changes of winner) in {counted(len(routed.layers), 'layer')}"
        f"{when}; {counted(unchanged, 'layer')} without any."
    )


def _predicted(routing: RoutingData, routed: RoutedLayers) -> str:
    """Return in how many layers shape and rates predict the winner, in a sentence."""
    if not routed.has_full:
        return "There was no full expert: shape and rates predict nothing."
    if not routing.has_shapes:
        return "The log has no shapes of layers: a prediction by shape is not made."
    count = len(routed.layers)
    same = count - routed.differing
    names = [one.name for one in routed.layers if one.differs]
    others = f" Different: {listed(names, _NAMED)}." if names else ""
    return (
        f"In {same} of {count} layers most decisions went to the winner that shape, scaling "
        f"and rates (LoRA {routed.rate_ratio:g} times full) predict without any gradient."
        f"{others}"
    )


def _figures(routing: RoutingData, routed: RoutedLayers) -> Iterator[Figure]:
    yield _winners(routing, routed)
    if routing.margin is not None:
        yield _margins(routing, routed)
    yield _shares(routing)
    yield _settled(routing, routed)
    yield _flips(routing, routed)
    yield _groups("kinds", "By kind of projection", "kind", routed.by_kind, routed)
    if len(routed.by_depth) > 1:
        yield _groups("depths", "By depth", "decoder layer", routed.by_depth, routed)


def _winners(routing: RoutingData, routed: RoutedLayers) -> Heat:
    totals = routing.wins.sum(axis=(1, 2)) / max(1, routing.decisions.sum())
    won = ", ".join(
        f"{name} {share:.1%}" for name, share in zip(routing.experts, totals, strict=True)
    )
    size = int(routing.last[0] - routing.first[0] + 1)
    binned = f" A cell is the mean of {size} steps." if size > 1 else ""
    pooled = int(np.bincount(routing.row_of).max())
    grouped = f" A row is the mean of up to {pooled} layers of a kind." if pooled > 1 else ""
    return Heat(
        name="winners",
        title="Winners by layer and step",
        text=f"Layers in the model's order from top to bottom, steps from left to right. Of all "
        f"decisions won: {won}.{binned}{grouped}",
        table=_layer_table(routed),
        rows=routing.rows,
        kinds=_kinds(routing),
        first=routing.first.tolist(),
        last=routing.last.tolist(),
        values=routing.cells,
        names=routing.experts,
    )


def _margins(routing: RoutingData, routed: RoutedLayers) -> Heat:
    margin = routing.margin
    assert margin is not None
    text = (
        "Margin of full: (full - LoRA) / (full + LoRA) of the scores, LoRA the best of its "
        f"experts. {routed.close} of {counted(len(routed.layers), 'layer')} have a mean margin "
        "within 0.05 of 0."
    )
    if routing.full_at is not None:
        text += (
            " The slider compares the recorded scores at another LoRA rate. It is no rerun: other "
            "winners would have changed the weights, and so all later scores."
        )
    return Heat(
        name="margins",
        title="Score margins",
        text=text,
        table=_rates_table(routing) if routing.full_at is not None else _layer_table(routed),
        rows=routing.rows,
        kinds=_kinds(routing),
        first=routing.first.tolist(),
        last=routing.last.tolist(),
        values=margin[None],
        names=(FULL, "LoRA"),
        is_margin=True,
        factors=FACTORS if routing.full_at is not None else None,
        full_at=routing.full_at,
        rate_ratio=routing.rate_ratio,
    )


def _kinds(routing: RoutingData) -> tuple[str, ...]:
    """Return the kind of projection of each row, which its layers share."""
    return tuple(name.split(" and ")[0].rpartition(".")[2] for name in routing.rows)


def _layer_table(routed: RoutedLayers) -> Table:
    columns = ["layer", *(f"won {name}" for name in routed.experts), "flips", "last flip"]
    if routed.has_full:
        columns += ["margin", "by shape"]

    def row(one: RoutedLayer) -> tuple[Cell, ...]:
        cells: list[Cell] = [one.name, *(plain(one.evidence.share(x)) for x in routed.experts)]
        cells += [one.evidence.changes, one.evidence.last_change]
        if routed.has_full:
            shape = one.by_shape
            text = None if shape is None else FULL if shape.r is None else f"r {shape.r}"
            cells += [plain(one.evidence.margin), text]
        return tuple(cells)

    return Table(tuple(columns), tuple(row(one) for one in routed.layers))


def _rates_table(routing: RoutingData) -> Table:
    """Return the share of decisions and the number of layers of `full` at each factor."""
    found = routing.full_at
    assert found is not None
    decided = ~np.isnan(found[:, 0])
    rows = [
        (
            plain(factor),
            plain(routing.rate_ratio * factor),
            plain(found[decided, number].mean()),
            int((found[decided, number] >= 0.5).sum()),
        )
        for number, factor in enumerate(FACTORS)
    ]
    columns = ("LoRA rate, times", "LoRA rate / full rate", "full wins", "layers full leads")
    return Table(columns, tuple(rows))


def _shares(routing: RoutingData) -> Figure:
    shares = routing.shares
    series = [Series(name, shares[number], number) for number, name in enumerate(routing.experts)]
    known = np.flatnonzero(~np.isnan(shares[0]))
    parts = [
        f"{one.name} from {one.values[known[0]]:.1%} to {one.values[known[-1]]:.1%}"
        for one in series
    ]
    return lines(
        "shares",
        "Share of layers that each expert won",
        f"{'; '.join(parts)}.",
        routing.last.astype(np.float64),
        series,
        y_label="share of layers",
        y_range=(0.0, 1.0),
    )


def _settled(routing: RoutingData, routed: RoutedLayers) -> Figure:
    last = np.sort([one.settled for one in routed.layers])
    steps = np.unique(np.concatenate(([1], last, [routing.last[-1]]))).astype(np.float64)
    shares = np.searchsorted(last, steps, side="right") / len(last)
    early = ", ".join(
        f"{routed.settled_by(share):.0%} after {share:.0%} of the steps"
        for share in (0.1, 0.3, 0.5)
    )
    return lines(
        "settled",
        "Layers after their last flip",
        f"Share of layers that kept their winner to the end: {early}.",
        steps,
        [Series("settled", shares, 2)],
        y_label="share of layers",
        y_range=(0.0, 1.0),
        stepped=True,
    )


def _flips(routing: RoutingData, routed: RoutedLayers) -> Figure:
    flips = [one.evidence.changes for one in routed.layers]
    most = sorted(routed.layers, key=lambda one: -one.evidence.changes)[:3]
    named = [f"{one.name} ({one.evidence.changes})" for one in most if one.evidence.changes]
    text = f"{sum(not one for one in flips)} of {len(flips)} layers never flip"
    text += f"; most often: {', '.join(named)}." if named else "."
    per_bin = routing.flips.sum(axis=0).astype(np.float64)
    return lines(
        "flips",
        "Flips over time",
        text,
        routing.last.astype(np.float64),
        [Series("flips", per_bin, 3)],
        y_label="layers that flipped",
        stepped=True,
    )


def _groups(
    name: str, title: str, first: str, groups: Sequence[Group], routed: RoutedLayers
) -> Bars:
    experts = routed.experts
    values = np.array([[group.won(expert) for expert in experts] for group in groups])
    columns = [first, "layers", *(f"won {expert}" for expert in experts), "flips", "last flip"]
    columns += ["margin", "full by shape", "differ"] if routed.has_full else []

    def row(group: Group, shares: Sequence[float]) -> tuple[Cell, ...]:
        cells: list[Cell] = [group.name, len(group.layers), *map(plain, shares)]
        cells += [plain(group.changes), plain(group.settled)]
        if routed.has_full:
            cells += [plain(group.margin), group.full_by_shape, group.differing]
        return tuple(cells)

    rows = tuple(row(group, shares) for group, shares in zip(groups, values, strict=True))
    parts = "; ".join(
        f"{group.name}: {experts[int(shares.argmax())]} {shares.max():.0%}"
        for group, shares in zip(groups, values, strict=True)
    )
    return Bars(
        name=name,
        title=title,
        text=f"Expert with the largest mean share of decisions: {parts}. Flips are changes of "
        "winner per layer; last flip is the median over layers, 1 without any.",
        table=Table(tuple(columns), rows),
        groups=tuple(group.name for group in groups),
        parts=experts,
        values=values,
        label="share of decisions",
    )
