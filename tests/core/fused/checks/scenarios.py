"""Lists of tensors for each operation, with every variant of every kernel among them."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.weight_step import Product
from molf.core.execute.triton import AdamW, Kernels, LowRank, Moments, Weight
from molf.core.step.operations import FactorWrite, Operand
from molf.core.storage.rounding import RoundingKey, split_float32

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

BETAS = (0.9, 0.999)
STEP = AdamWStep(1e-2, 0.1, BETAS, 1e-8, 3)
ROUNDINGS = ["none", "nearest", "exact", "stochastic"]
GRADS = {"none": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
# One element; odd; several blocks, the last one short; good for vector loads, several blocks.
SHAPES = [(1,), (37, 53), (2, 2500), (64, 80)]
# (rows, cols, K): one element; odd tiles with a short last part of K; vector loads; no product.
PRODUCTS = [(1, 1, 1), (70, 81, 37), (64, 80, 8), (3, 5, 0)]


class Source:
    """Random tensors that depend on a seed and the order of asking."""

    def __init__(self, seed: int, device: torch.device = DEVICE) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        return values.to(dtype).to(self.device)

    def moments(self, *shape: int) -> tuple[Tensor, Tensor]:
        exp_avg = self.normal(*shape)
        return exp_avg, exp_avg.square() + 0.1 * self.normal(*shape).square()

    def weight(self, values: Tensor, rounding: str, number: int = 0) -> Weight:
        """A weight with these float32 values, or near them if it cannot hold them."""
        if rounding == "none":
            return Weight(values.clone())
        if rounding == "exact":
            return Weight(*split_float32(values))
        key = RoundingKey.of(0, f"weight {number}", 3) if rounding == "stochastic" else None
        return Weight(values.bfloat16(), None, key, first_index=1000 * number)


def moments_items(grad: torch.dtype, source: Source) -> list[Moments]:
    """Whole tensors, then the columns of one expert of three in stacked B factors."""
    items = [
        Moments(source.normal(*shape, dtype=grad), *source.moments(*shape), BETAS)
        for shape in SHAPES
    ]
    stacked = (source.normal(45, 9, dtype=grad), *source.moments(45, 9))
    return [*items, Moments(*(tensor[:, 2:6] for tensor in stacked), (0.5, 0.99))]


def adamw_items(rounding: str, grad: torch.dtype | None, source: Source) -> list[AdamW]:
    items = []
    for number, shape in enumerate(SHAPES):
        weight = source.weight(source.normal(*shape), rounding, number)
        given = None if grad is None else source.normal(*shape, dtype=grad)
        items.append(AdamW(weight, *source.moments(*shape), STEP, given, BETAS))
    return items


def factor_items(source: Source) -> list[FactorWrite]:
    """A and B of two layers; in the second, experts are slices of stacked factors."""
    items = []
    for rows, cols, rank, stacked in ((48, 32, 16, 16), (11, 7, 2, 5)):
        left, right = source.normal(rows, 2 * rank), source.normal(2 * rank, cols)
        B, A = source.normal(rows, stacked), source.normal(stacked, cols)
        moments_B, moments_A = source.moments(rows, stacked), source.moments(stacked, cols)
        own = slice(stacked - rank, stacked)
        outputs_B = Operand(left[:, :rank], 0.0, 0.7), Operand(left[:, rank:], 0.7, 0.0)
        outputs_A = Operand(right[:rank], 1.0, 1.0), Operand(right[rank:], 1e-3, 1.0)
        items.append(FactorWrite(B[:, own], *(m[:, own] for m in moments_B), STEP, outputs_B))
        items.append(FactorWrite(A[own], *(m[own] for m in moments_A), STEP, outputs_A))
    return items


def low_rank_items(rounding: str, source: Source) -> list[LowRank]:
    """Of each shape one where `full` has won and one where it has not; then a transposed layer."""
    items = []
    for rows, cols, inner in PRODUCTS:
        for has_full in (True, False):
            weight = source.weight(source.normal(rows, cols), rounding, len(items))
            factors = source.normal(rows, inner), source.normal(inner, cols)
            full = (*source.moments(rows, cols), STEP) if has_full else None
            items.append(LowRank(weight, Product(*factors, 1.0), full))
    left, right = source.normal(9, 4), source.normal(4, 70)
    weight = source.weight(source.normal(70, 9), rounding, len(items))
    return [
        *items,
        LowRank(weight, Product(right.t(), left.t(), 1.0), (*source.moments(70, 9), STEP)),
    ]


def run_everything(kernels: Kernels, device: torch.device = DEVICE) -> None:
    """Run every operation on all of the above."""
    source = Source(0, device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for grad in (torch.float32, torch.bfloat16):
        items = moments_items(grad, source)
        kernels.squares([item.grad for item in items])
        for term in ("descent", "norm"):
            kernels.moments(items, finite, term)
    for rounding in ROUNDINGS:
        for grad in GRADS.values():
            kernels.adamw(adamw_items(rounding, grad, source), finite)
        kernels.low_rank(low_rank_items(rounding, source), finite)
    kernels.factors(factor_items(source), finite)
