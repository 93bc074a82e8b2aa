"""The share of updates that rounding loses, as the optimizer measures it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from core_helpers import feed, tiny_model, tiny_optimizer
from molf import AdamW
from molf.core.arithmetic.blocks import Blocks
from molf.core.execute.eager import Eager
from molf.core.step import fidelity

BF16 = torch.bfloat16


def adamw(weights: torch.Tensor, rounding: str | None, lr: float, **options):
    parameter = nn.Parameter(weights.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parameter, AdamW([parameter], lr=lr, weight_rounding=rounding, **options)


def measured(weights, rounding, lr, **options):
    """One step with gradients of both signs; the measured fidelity and the true one."""
    executor = options.pop("executor", None)
    parameter, optimizer = adamw(weights, rounding, lr, weight_decay=0.0, **options)
    optimizer.executor = executor or optimizer.executor
    optimizer.measure_updates = True
    grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).to(weights.dtype)
    parameter.grad = grad
    before = optimizer.float32_weights().get(parameter, parameter.detach()).double().clone()
    optimizer.step()
    after = optimizer.float32_weights().get(parameter, parameter.detach()).double()
    update = -lr * grad.double().sign()  # Adam's first step
    lost = (after == before).double().mean().item()
    kept = (((after - before) * update).sum() / update.square().sum()).item()
    return optimizer.update_fidelity, lost, kept


@pytest.mark.parametrize("shape", [(64, 32), (700, 300)])
@pytest.mark.parametrize(
    ("dtype", "rounding", "low", "high"),
    [
        (torch.float32, None, 0.0, 0.0),
        (BF16, "exact", 0.0, 0.0),
        (BF16, "stochastic", 0.3, 0.95),
        (BF16, "nearest", 0.5, 0.95),
    ],
)
def test_what_is_measured_is_what_is_lost(shape, dtype, rounding, low, high):
    weights = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got, lost, kept = measured(weights.to(BF16).to(dtype), rounding, 2e-5)
    assert low <= lost <= high
    tolerance = 1e-6 if weights.numel() < 65_536 else 0.02  # all of it, or a sample
    assert got.lost == pytest.approx(lost, abs=tolerance)
    assert got.kept == pytest.approx(kept, abs=1e-3 if rounding == "exact" else 0.1)
    if rounding in (None, "exact", "stochastic"):
        assert got.kept == pytest.approx(1.0, abs=0.1)


def test_float32_loses_updates_too_where_they_are_small_enough():
    got, lost, _ = measured(torch.ones(50, 50), None, 1e-8)
    assert got.lost == lost == 1.0
    assert got.kept == 0.0


def test_elements_without_an_update_do_not_count():
    parameter, optimizer = adamw(torch.ones(4, dtype=BF16), "nearest", 1e-5, weight_decay=0.0)
    optimizer.measure_updates = True
    parameter.grad = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=BF16)
    optimizer.step()
    assert optimizer.update_fidelity.lost == 1.0  # the one update, not one in four
    parameter.grad = torch.zeros_like(parameter)
    _, fresh = adamw(torch.ones(4), None, 1e-5, weight_decay=0.0)
    fresh.measure_updates = True
    fresh.step()
    assert fresh.update_fidelity is None


@pytest.mark.parametrize("rounding", ["exact", "nearest"])
@pytest.mark.parametrize("score", ["full", "lora"])
def test_routed_layers_are_measured(rounding, score):
    model = tiny_model(BF16)
    optimizer = tiny_optimizer(model, score=score, lr=2e-5, weight_rounding=rounding)
    optimizer.measure_updates = True
    for step in range(3):
        feed(model, step)
        optimizer.step()
    lost = optimizer.update_fidelity.lost
    assert lost < 0.02 if rounding == "exact" else lost > 0.5


@pytest.mark.parametrize("shape", [(4096, 64), (32, 8192), (262_144,), (3, 200_000), (), (0, 4)])
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_blocks_do_not_change_what_is_sampled(shape, size):
    tensor = torch.empty(shape)
    tally = fidelity.UpdateTally
    if not shape:
        assert tally.sample(tensor) is ...
        assert tally.weight(tensor) == 1
        return
    rows = torch.arange(len(tensor))
    whole = rows[tally.sample(tensor)]
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    parts = [rows[block][tally.sample(tensor, block)] for block in blocks]
    assert torch.equal(torch.cat([rows[:0], *parts]), whole)
    sampled = len(whole) * (tensor.numel() // max(1, len(tensor)))
    assert sampled * tally.weight(tensor) == tensor.numel()
    row = tensor.numel() // max(1, len(tensor))
    assert tensor.numel() == 0 or 32_768 <= sampled <= max(2 * 65_536, row)


def test_large_tensors_are_sampled(monkeypatch):
    monkeypatch.setattr(fidelity, "_SAMPLE", 256)
    seen = []
    add = fidelity.UpdateTally.add
    monkeypatch.setattr(
        fidelity.UpdateTally,
        "add",
        lambda self, before, *rest, **more: (
            seen.append((before.numel(), more["weight"])),
            add(self, before, *rest, **more),
        ),
    )
    executor = Eager(Blocks(cpu_elements=1024))  # blocks of 8 rows
    measured(torch.ones(512, 128).to(BF16), "nearest", 1e-5, executor=executor)
    assert sum(count for count, _ in seen) == 256  # of 65,536
    assert sum(count * weight for count, weight in seen) == 512 * 128
