"""Arguments of the kernels beside `molf.core.operations`: tensors as they are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.adam import AdamWStep
from molf.core.rounding import RoundingKey
from molf.core.weight_step import Product


class Moments(NamedTuple):
    """Moments to move and to score. All tensors have one shape and contiguous rows.

    Attributes:
        grad: float32 or bfloat16.
        exp_avg: m, float32.
        exp_avg_sq: v, float32.
        betas: (b1, b2).
    """

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    betas: tuple[float, float]


class Weight(NamedTuple):
    """A weight and how it is stored: float32, or bfloat16 with one of three roundings.

    Attributes:
        values: float32 or bfloat16.
        low: int16 low half (`molf.core.rounding`); the bfloat16 weight is then exact.
        key: Of this tensor and step; the bfloat16 weight is then rounded stochastically. Without
            `low` and `key` it is rounded to nearest, ties to even.
        first_index: Index of the first element in the whole tensor, of which this may be a shard
            of rows.
    """

    values: Tensor
    low: Tensor | None = None
    key: RoundingKey | None = None
    first_index: int = 0

    @property
    def rounding(self) -> str:
        """`"none"`, `"exact"`, `"stochastic"` or `"nearest"`."""
        if self.values.dtype == torch.float32:
            return "none"
        if self.low is not None:
            return "exact"
        return "nearest" if self.key is None else "stochastic"


class AdamW(NamedTuple):
    """A tensor that takes a plain AdamW step. All tensors have one shape and contiguous rows.

    Attributes:
        weight: The tensor.
        exp_avg: m, float32.
        exp_avg_sq: v, float32.
        step: The step's scalars.
        grad: float32 or bfloat16: the moments move in the same pass. None: they have moved.
        betas: (b1, b2), used with `grad`.
    """

    weight: Weight
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: AdamWStep
    grad: Tensor | None = None
    betas: tuple[float, float] = (0.0, 0.0)


class LowRank(NamedTuple):
    """A routed weight: `W <- kept W + alpha left @ right`, minus the descent for `full`.

    Attributes:
        weight: [rows, cols], contiguous.
        product: In the orientation of the weight: float32, left [rows, K], right [K, cols], any
            strides.
        full: (m, v, the AdamW step) where `full` has won; None where it has not, and all of W is
            kept.
    """

    weight: Weight
    product: Product
    full: tuple[Tensor, Tensor, AdamWStep] | None = None
