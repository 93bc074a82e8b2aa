"""Arguments of the kernels, besides those in `molf.core.step.operations`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.weight_step import Product
from molf.core.storage.rounding import RoundingKey


class Moments(NamedTuple):
    """Moments to update and score. All tensors have one shape and contiguous rows.

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
    """A float32 weight, or a bfloat16 weight with one of three roundings.

    Attributes:
        values: float32 or bfloat16.
        low: Low half, int16 (`molf.core.storage.rounding`): rounding is exact.
        key: Key of this tensor and step: rounding is stochastic. Without `low` and `key` bfloat16
            is rounded to nearest, ties to even.
        first_index: Index of the first element in the whole tensor.
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
        step: AdamW scalars.
        grad: float32 or bfloat16: moments are updated in the same pass. None: they are updated.
        betas: (b1, b2), used with `grad`.
    """

    weight: Weight
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: AdamWStep
    grad: Tensor | None = None
    betas: tuple[float, float] = (0.0, 0.0)


class LowRank(NamedTuple):
    """A routed weight: `W <- (1 - lr wd) W + alpha left @ right - AdamW update`.

    Attributes:
        weight: [rows, cols], contiguous.
        product: float32, left [rows, K], right [K, cols], any strides.
        full: (m, v, AdamW scalars) if `full` has won. None: no decay, no update.
    """

    weight: Weight
    product: Product
    full: tuple[Tensor, Tensor, AdamWStep] | None = None
