"""Compute each expert's share of won updates from a run's routing log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from molf.errors import InputError
from molf.job.record.routing_log import read_routing

Shares = dict[str, float]


@dataclass(frozen=True)
class RoutingShares:
    """Each expert's share of won updates.

    Attributes:
        steps: Number of routed steps.
        total: By expert.
        by_kind: By kind of module (the last part of its name), then by expert.
        by_layer: By layer, then by expert.
    """

    steps: int
    total: Shares
    by_kind: dict[str, Shares]
    by_layer: dict[str, Shares]


def routing_shares(run: Path) -> RoutingShares:
    """Return the shares of a run; layers, kinds and experts in the optimizer's order.

    Raises:
        InputError: `run` is no run directory, its method does not route, or it decided nothing.
    """
    everything = read_routing(run)
    routing = everything.filter(_decided(everything))
    if not len(routing):
        raise InputError(f"{run} took no step at a rate above 0, so no expert won anything.")
    layers = routing["layer"]
    # layers.3.mlp.up_proj is of the kind up_proj.
    kinds = pc.replace_substring_regex(layers, r"^.*\.", "")
    return RoutingShares(
        steps=pc.count_distinct(everything["step"]).as_py(),
        total=_by(routing, pa.repeat("all", len(routing)))["all"],
        by_kind=_by(routing, kinds),
        by_layer=_by(routing, layers),
    )


def _decided(routing: pa.Table) -> pa.Array:
    """Return a mask of the rows of decisions with a score above 0."""
    # At rate 0 all experts score 0, and a tie is no win. Each decision has one row per expert.
    experts = pc.count_distinct(routing["expert"]).as_py()
    scores = routing["score"].to_numpy().reshape(-1, experts)
    return pa.array(np.repeat(scores.any(axis=1), experts))


def _by(routing: pa.Table, keys: pa.Array) -> dict[str, Shares]:
    table = pa.table(
        {"key": keys, "expert": routing["expert"], "won": routing["winner"].cast(pa.float64())}
    )
    # One thread keeps groups in order of first appearance.
    groups = table.group_by(["key", "expert"], use_threads=False).aggregate([("won", "mean")])
    shares: dict[str, Shares] = {}
    for row in groups.to_pylist():
        shares.setdefault(row["key"], {})[row["expert"]] = row["won_mean"]
    return shares
