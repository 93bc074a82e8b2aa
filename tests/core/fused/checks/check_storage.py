"""How weights are stored: the bits of molf.core.storage.rounding of the float32 result."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scenarios import DEVICE, GRADS, STEP, Source, adamw_items, low_rank_items
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.execute.triton import AdamW, Kernels, Weight
from molf.core.storage.rounding import RoundingKey, join_float32, round_stochastic, split_float32

YES = torch.ones((), dtype=torch.bool, device=DEVICE)
ROUNDED = ["nearest", "exact", "stochastic"]
LOWS = [0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF]
# The largest finite values and the NaNs that carries or cuts could turn into something else.
SPECIAL = [0x7F7FFFFF, 0xFF7FFFFF, 0x7F800001, 0xFF807FFF, 0x7FFF8000, 0x7FFFFFFF, 0xFFFFFFFF]


def stored(result: Tensor, weight: Weight) -> tuple[Tensor, Tensor | None]:
    """What a weight should hold when its step gives `result`, float32."""
    if weight.rounding == "exact":
        return split_float32(result)
    if weight.rounding == "stochastic":
        return round_stochastic(result, weight.key, weight.first_index), None
    return result.bfloat16(), None


def value(weight: Weight) -> Tensor:
    """The float32 value that a weight stands for."""
    if weight.rounding == "exact":
        return join_float32(weight.values, weight.low)
    return weight.values.float()


def assert_stored(items: list, twins: list) -> None:
    """Compare rounded weights with the results of the same step on float32 weights."""
    for item, twin in zip(items, twins, strict=True):
        high, low = stored(twin.weight.values, item.weight)
        assert torch.equal(item.weight.values.view(torch.int16), high.view(torch.int16))
        assert low is None or torch.equal(item.weight.low, low)


@pytest.mark.parametrize("rounding", ROUNDED)
@pytest.mark.parametrize("grad", GRADS)
def test_adamw(grad, rounding):
    kernels = Kernels(DEVICE)
    items = adamw_items(rounding, GRADS[grad], Source(0))
    twins = [
        item._replace(
            weight=Weight(value(item.weight).clone()),
            exp_avg=item.exp_avg.clone(),
            exp_avg_sq=item.exp_avg_sq.clone(),
        )
        for item in items
    ]
    for _ in range(2):
        kernels.adamw(items, YES)
        kernels.adamw(twins, YES)
        assert_stored(items, twins)
        twins = [
            twin._replace(weight=Weight(value(item.weight).clone()))
            for item, twin in zip(items, twins, strict=True)
        ]


@pytest.mark.parametrize("rounding", ROUNDED)
def test_low_rank(rounding):
    kernels = Kernels(DEVICE)
    items = low_rank_items(rounding, Source(1))
    twins = [item._replace(weight=Weight(value(item.weight).clone())) for item in items]
    kernels.low_rank(items, YES)
    kernels.low_rank(twins, YES)
    assert_stored(items, twins)


def test_exact_weights_take_the_path_of_float32_weights():
    """For 20 steps at a rate far below a bfloat16's resolution."""
    source, kernels = Source(2), Kernels(DEVICE)
    start = source.normal(300)
    step = replace(STEP, lr=1e-6)
    whole, split = Weight(start.clone()), Weight(*split_float32(start))
    for _ in range(20):
        moments = source.moments(300)
        for weight in (whole, split):
            kernels.adamw([AdamW(weight, *moments, step)], YES)
    assert torch.equal(value(split), whole.values)
    assert not torch.equal(split.low, split_float32(start)[1])


def chosen_bits() -> np.ndarray:
    """All 65,536 upper halves, each with one of the chosen lower halves, and special values."""
    high = np.arange(1 << 16)
    return np.append((high << 16) | np.asarray(LOWS)[high % len(LOWS)], SPECIAL)


def as_float32(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.int32)).to(DEVICE).view(torch.float32)


def test_an_exact_weight_that_does_not_move_keeps_its_bits():
    """Ties, subnormals, infinities and NaNs of every payload included."""
    high, low = split_float32(as_float32(chosen_bits()))
    weight = Weight(high.clone(), low.clone())
    moments = torch.zeros_like(high, dtype=torch.float32), torch.ones_like(low, dtype=torch.float32)
    still = AdamWStep(lr=1.0, weight_decay=0.0, betas=(0.0, 0.0), eps=0.0, step=1)
    Kernels(DEVICE).adamw([AdamW(weight, *moments, still)], YES)
    # Arithmetic makes a signalling NaN quiet; everything else is what it was.
    nan = high.isnan()
    assert torch.equal(weight.values.isnan(), nan)
    assert torch.equal(weight.values[~nan].view(torch.int16), high[~nan].view(torch.int16))
    assert torch.equal(weight.low[~nan], low[~nan])


@pytest.mark.parametrize("rounding", ROUNDED)
def test_every_kind_of_result(rounding):
    """0 - 1 * (-x / 1) is x: a step that can have any float32 as its result."""
    result = as_float32(chosen_bits())
    result = result[result != 0]  # 0 - (-0.0) loses a sign
    zeros = torch.zeros_like(result, dtype=torch.bfloat16)
    low = torch.zeros_like(result, dtype=torch.int16) if rounding == "exact" else None
    key = RoundingKey.of(0, "any", 1) if rounding == "stochastic" else None
    weight = Weight(zeros, low, key, first_index=(1 << 32) - 30_000)
    unit = AdamWStep(lr=1.0, weight_decay=0.0, betas=(0.0, 0.0), eps=0.0, step=1)
    Kernels(DEVICE).adamw([AdamW(weight, -result, torch.ones_like(result), unit)], YES)
    high, low = stored(result, weight)
    nan = result.isnan()
    assert torch.equal(weight.values.isnan(), nan)
    assert torch.equal(weight.values[~nan].view(torch.int16), high[~nan].view(torch.int16))
    assert low is None or torch.equal(weight.low[~nan], low[~nan])


def test_a_shard_draws_what_the_whole_would():
    source, kernels = Source(3), Kernels(DEVICE)
    values, moments = source.normal(50, 21).bfloat16(), source.moments(50, 21)
    key = RoundingKey.of(0, "sharded", 9)
    whole = Weight(values.clone(), key=key)
    kernels.adamw([AdamW(whole, *moments, STEP)], YES)
    pieces = []
    for rows in (slice(0, 17), slice(17, 50)):
        piece = Weight(values[rows].clone(), key=key, first_index=21 * rows.start)
        kernels.adamw([AdamW(piece, *(m[rows] for m in moments), STEP)], YES)
        pieces.append(piece.values)
    assert torch.equal(torch.cat(pieces), whole.values)
