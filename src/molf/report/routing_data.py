"""Aggregate the routing log of a run: layers x bins of time, part by part.

Memory is that of one part and of the bins, whatever the number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molf.core.config import MoLFConfig
from molf.errors import InputError
from molf.job.advice.advice import rate_ratio_of
from molf.job.advice.routed import RoutedLayers, routed_layers
from molf.job.record.assignment_source import experts_of
from molf.job.record.finished_run import FinishedRun
from molf.job.record.routing_arrays import (
    Counts,
    Decisions,
    RoutingArrays,
    margins,
    pooled_rows,
    read_arrays,
)
from molf.job.record.routing_log import routing_shapes
from molf.job.settings.defaults import ROUTED
from molf.shown import counted, listed

MOST_ROWS = 200
FACTORS = 2.0 ** (np.arange(-24, 25) / 4)
"""Factors of the LoRA rate, from 1/64 to 64, at which the recorded EPD scores are compared."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RoutingData:
    """The routing of a run, aggregated.

    Attributes:
        experts: Names of the experts, `full` first if there is one.
        layers: Names of all routed layers, in the model's order.
        row_of: Row of each layer in the maps; several of a kind share one above `MOST_ROWS`:
            [L].
        first: First step of each bin, from 1: [B].
        last: Last step of each bin: [B].
        decisions: Number of decisions: [R, B].
        wins: Number of decisions that each expert won: [E, R, B].
        margin: Mean margin of `full`, NaN without a decision: [R, B]; None without `full` and LoRA.
        flips: Changes of winner: [R, B].
        routed: Evidence by layer, kind and depth; None if every step was at rate 0.
        rate_ratio: LoRA rate divided by the rate of `full`.
        full_at: For EPD with one winner: share of each layer's decisions that `full` would win by
            the recorded scores, at each of `FACTORS`: [L, F]; None for another rule.
        has_shapes: Whether the log has the shapes of the layers.
    """

    experts: tuple[str, ...]
    layers: tuple[str, ...]
    row_of: Integers
    first: Integers
    last: Integers
    decisions: Integers
    wins: Integers
    margin: Floats | None
    flips: Integers
    routed: RoutedLayers | None
    rate_ratio: float
    full_at: Floats | None
    has_shapes: bool

    @property
    def shares(self) -> Floats:
        """Each expert's share of the decisions of a bin, NaN without one: [E, B]."""
        return _divide(self.wins.sum(axis=1), self.decisions.sum(axis=0))

    @property
    def cells(self) -> Floats:
        """Each expert's share of the decisions of a cell, NaN without one: [E, R, B]."""
        return _divide(self.wins, self.decisions)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows: a layer, or the first and the number of its layers."""
        names = []
        for row in range(len(self.decisions)):
            members = np.flatnonzero(self.row_of == row)
            names.append(listed([self.layers[number] for number in members], 1))
        return tuple(names)


def read_routing_data(
    run: FinishedRun, *, most_bins: int = 400
) -> tuple[RoutingData | None, list[str]]:
    """Return the routing of a run, and a notice for each part that is missing or damaged.

    Args:
        run: The run.
        most_bins: The largest number of bins of time.
    """
    if run.method not in ROUTED:
        return None, []
    try:
        arrays = read_arrays(run.path, skip_damaged=True)
    except InputError as error:
        return None, [str(error)]
    notices = [f"Routing: {line}. Its steps are left out." for line in arrays.damaged]
    if not arrays.parts:
        return None, notices
    gaps = _missing_steps(arrays)
    if gaps:
        notices.append(f"Routing: {gaps}")
    try:
        config, ratio = experts_of(run), rate_ratio_of(run)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        notices.append(f"Routing is not shown: config.yaml lacks or misstates an option ({error}).")
        return None, notices
    is_epd = run.config.get("score") == "epd" and run.config.get("top_k") == 1
    data = _aggregate(arrays, config, ratio, most_bins, with_rates=is_epd)
    if data.routed is None:
        notices.append("Every routed step was at rate 0, so no expert has won anything.")
    return data, notices


def _missing_steps(arrays: RoutingArrays) -> str:
    """Return a sentence if numbers of parts are missing; empty if none are."""
    numbers = [int(path.stem.removeprefix("part-")) for path in arrays.parts]
    missing = max(numbers) + 1 - len(numbers) - len(arrays.damaged)
    are = "is" if missing == 1 else "are"
    return f"{counted(missing, 'part')} of the log {are} missing." if missing > 0 else ""


def _aggregate(
    arrays: RoutingArrays, config: MoLFConfig, ratio: float, most_bins: int, *, with_rates: bool
) -> RoutingData:
    layers, experts = arrays.layers, arrays.experts
    row_of = pooled_rows(layers, MOST_ROWS)
    rows = int(row_of.max()) + 1
    per_bin = max(1, -(-arrays.last_step // most_bins))
    bins = -(-arrays.last_step // per_bin)
    counts = Counts(layers, experts)
    decisions = np.zeros((rows, bins), dtype=np.int64)
    wins = np.zeros((len(experts), rows, bins), dtype=np.int64)
    flips = np.zeros((rows, bins), dtype=np.int64)
    margin = np.zeros((rows, bins)) if "full" in experts and len(experts) > 1 else None
    full_wins = np.zeros((len(layers), len(FACTORS))) if with_rates and margin is not None else None
    total = np.zeros(len(layers))
    for part in arrays:
        counts.add(part)
        decided = part.decided
        bin_of = (part.steps - 1) // per_bin

        def add(target: npt.NDArray[np.generic], values: npt.NDArray[np.generic]) -> None:
            # One cell per layer and step, summed into its row and bin.
            np.add.at(target, (row_of[None, :], bin_of[:, None]), values)  # noqa: B023

        add(decisions, decided)
        add(flips, counts.changed)
        for number in range(len(experts)):
            add(wins[number], part.won[:, :, number] & decided)
        if margin is not None:
            found = margins(part, experts)
            assert found is not None
            add(margin, np.where(decided, found, 0.0))
        if full_wins is not None:
            full_wins += _full_wins(part, experts)
            total += decided.sum(axis=0)
    first = np.arange(bins) * per_bin + 1
    shapes = routing_shapes(arrays.parts[-1])
    return RoutingData(
        experts=tuple(experts),
        layers=tuple(layers),
        row_of=row_of,
        first=first,
        last=np.minimum(first + per_bin - 1, arrays.last_step),
        decisions=decisions,
        wins=wins,
        margin=None if margin is None else _divide(margin, decisions),
        flips=flips,
        routed=routed_layers(counts.evidence(), shapes, config, ratio),
        rate_ratio=ratio,
        full_at=None if full_wins is None else _divide(full_wins, total[:, None]),
        has_shapes=bool(shapes),
    )


def _full_wins(part: Decisions, experts: list[str]) -> Floats:
    """Return how many decisions of each layer `full` would win at each factor: [L, F]."""
    leads = part.leads(experts)
    assert leads is not None
    full, lora = leads
    # `full` wins a tie: it is the first expert.
    won = [((full >= lora * factor) & part.decided).sum(axis=0) for factor in FACTORS]
    return np.stack(won, axis=1).astype(np.float64)


def _divide(total: Integers | Floats, count: Integers | Floats) -> Floats:
    """Return the means; NaN where the count is 0."""
    total, count = np.broadcast_arrays(total, count)
    made = np.full(total.shape, np.nan)
    np.divide(total, count, out=made, where=count > 0)
    return made
