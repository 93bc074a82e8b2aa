"""The routed layers of a run: parameters that an update changed, and weights updated in full."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from molf.core.assignment.assigned import FULL
from molf.errors import InputError
from molf.job.record.ownership import MODEL
from molf.job.record.result import RunResult

_RANK = re.compile(r"lora\d+_r(\d+)")


@dataclass(frozen=True)
class RoutedLayer:
    """A routed layer of a finished run.

    Attributes:
        shares: By expert, its share of the updates.
        weight: The shape of the layer's weight.
        bias: Number of elements of its bias; 0 without one.
    """

    shares: dict[str, float]
    weight: tuple[int, ...]
    bias: int


def routed_layers(run: RunResult) -> list[RoutedLayer] | None:
    """Return the routed layers of a run with its saved model; None where they cannot be read."""
    from molf.job.record.routing_shares import routing_shares

    try:
        layers = routing_shares(run.directory).by_layer
        shapes = _shapes(run.directory / MODEL)
        # The checkpoint may have other names than the modules: a LookupError.
        return [
            RoutedLayer(shares, shapes[f"{layer}.weight"], prod(shapes.get(f"{layer}.bias", (0,))))
            for layer, shares in layers.items()
        ]
    except (InputError, OSError, LookupError):
        return None


def moved_parameters(trained: int, layers: Iterable[RoutedLayer]) -> int:
    """Return how many of the trained parameters an update changed.

    All trained parameters have optimizer state. In a routed layer only winners are updated; the
    experts that won no update of a layer are subtracted.

    Args:
        trained: Number of trained parameters.
        layers: The routed layers.
    """
    moved = trained
    for layer in layers:
        for expert, share in layer.shares.items():
            if not share:
                rank = _RANK.fullmatch(expert)
                dense = prod(layer.weight) + layer.bias
                moved -= int(rank[1]) * sum(layer.weight) if rank else dense
    return moved


def full_weights(layers: Iterable[RoutedLayer]) -> float | None:
    """Return the share of the weights' updates that were full; None without a full expert.

    A layer counts by the size of its weight; `won/full` counts all layers alike.

    Args:
        layers: The routed layers.
    """
    sizes = [(prod(layer.weight), layer.shares.get(FULL)) for layer in layers]
    if not sizes or any(share is None for _, share in sizes):
        return None
    return sum(size * (share or 0.0) for size, share in sizes) / sum(size for size, _ in sizes)


def _shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a checkpoint."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes
