"""The number of parameters that a run changed: those of experts without a win keep their values."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

from molf.errors import InputError
from molf.job.record.ownership import MODEL
from molf.job.record.result import RunResult

FULL = "full"
_RANK = re.compile(r"lora\d+_r(\d+)")


def moved_parameters(run: RunResult) -> int | None:
    """Return how many of the trained parameters an update changed; None where it is unknown.

    All trained parameters have optimizer state. In a routed layer only winners are updated; the
    experts that won no update of a layer are subtracted.

    Args:
        run: The finished run, with its saved model.
    """
    if not run.shares:
        return run.trained_parameters
    from molf.job.record.routing_shares import routing_shares

    try:
        layers = routing_shares(run.directory).by_layer
        shapes = _shapes(run.directory / MODEL)
    except (InputError, OSError):
        return None
    moved = run.trained_parameters
    for layer, shares in layers.items():
        weight = shapes.get(f"{layer}.weight")
        if weight is None:  # the checkpoint has other names than the modules
            return None
        bias = prod(shapes.get(f"{layer}.bias", (0,)))
        for expert, share in shares.items():
            if not share:
                rank = _RANK.fullmatch(expert)
                moved -= int(rank[1]) * sum(weight) if rank else prod(weight) + bias
    return moved


def _shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a checkpoint."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes
