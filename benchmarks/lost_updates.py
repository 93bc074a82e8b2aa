"""Measure the loss of small updates by rounding, with AdamW on random gradients.

    python benchmarks/lost_updates.py [--direction 1] [--noise 1]

Weights are drawn from N(0, 0.02^2), as in language models, and stored in bfloat16. Gradients of 50
steps have a fixed direction per element plus noise, of the two given sizes. For each rate and
rounding, a line has: the share of weights that have not moved after all steps; the mean movement,
and the movement along that of float32 weights, both as shares of the float32 movement; and the
optimizer's own measurement of its last step. The last line of a rate is torch's AdamW, whose
moments are bfloat16 too.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import torch
from torch import nn

from molf import AdamW

_STEPS = 50
_RATES = (1e-4, 5e-5, 2e-5)
_SHAPE = (1024, 1024)


_SETTINGS = {
    "float32": None,
    "bfloat16, exact": "exact",
    "bfloat16, stochastic": "stochastic",
    "bfloat16, nearest": "nearest",
    "bfloat16 with bfloat16 moments, nearest": "torch",
}


def run(
    lr: float, rounding: str | None, sizes: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor, float | None, float | None]:
    """Return the weights at start and end, and the measured shares of lost and kept updates."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(_SHAPE, generator=generator)).bfloat16()
    direction = sizes[0] * torch.randn(_SHAPE, generator=generator)
    weight = nn.Parameter(start.clone() if rounding else start.float())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Trained weights are")
        optimizer: torch.optim.Optimizer
        if rounding == "torch":
            optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0, foreach=False)
        else:
            optimizer = AdamW([weight], lr=lr, weight_decay=0.0, weight_rounding=rounding)
    for step in range(_STEPS):
        noise = sizes[1] * torch.randn(_SHAPE, generator=generator)
        weight.grad = (direction + noise).bfloat16().to(weight.dtype)
        if isinstance(optimizer, AdamW):
            optimizer.measure_updates = step == _STEPS - 1
        optimizer.step()
    if not isinstance(optimizer, AdamW):
        return start.double(), weight.detach().double(), None, None
    measured = optimizer.update_fidelity
    assert measured is not None, "the last step was measured"
    end = optimizer.float32_weights().get(weight, weight.detach()).double()
    return start.double(), end, round(measured.lost, 4), round(measured.kept, 4)


def main() -> None:
    """Print one line of JSON for each rate and rounding."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--direction", type=float, default=1.0, help="size of the fixed direction")
    parser.add_argument("--noise", type=float, default=1.0, help="size of the noise per step")
    options = parser.parse_args()
    sizes = options.direction, options.noise
    for lr in _RATES:
        start, true, *_ = run(lr, None, sizes)
        wanted = true - start
        for name, rounding in _SETTINGS.items():
            start, end, lost, kept = run(lr, rounding, sizes)
            moved = end - start
            record = {
                "lr": lr,
                "weights": name,
                "never_moved": round((moved == 0).double().mean().item(), 4),
                "mean_movement": round((moved.abs().mean() / wanted.abs().mean()).item(), 4),
                "along": round(((moved * wanted).sum() / wanted.square().sum()).item(), 4),
                "lost_updates": lost,
                "update_kept": kept,
            }
            json.dump(record, sys.stdout)
            print(flush=True)


if __name__ == "__main__":
    main()
