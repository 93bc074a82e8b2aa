"""What the fused operations work on: tuples of tensors and scalars, one per tensor to move."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.rounding import RoundingKey


class Step(NamedTuple):
    """The scalars of one tensor's AdamW step.

    Attributes:
        kept: `1 - lr wd`.
        decay: `lr wd`.
        step_size: `lr / (1 - b1^t)`.
        correction: `sqrt(1 - b2^t)`.
        eps: Added to the corrected root of the second moment.
    """

    kept: float
    decay: float
    step_size: float
    correction: float
    eps: float

    @classmethod
    def of(
        cls, lr: float, weight_decay: float, betas: tuple[float, float], eps: float, step: int
    ) -> Step:
        """Compute them in float64 from hyper-parameters and the counter t, 1 at the first step."""
        decay = lr * weight_decay
        correction = (1 - betas[1] ** step) ** 0.5
        return cls(1 - decay, decay, lr / (1 - betas[0] ** step), correction, eps)


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
    step: Step
    grad: Tensor | None = None
    betas: tuple[float, float] = (0.0, 0.0)


class Output(NamedTuple):
    """A part of a product's operand: `old P + increment dP`, with P from before the step.

    Attributes:
        values: float32, the factor's shape, contiguous rows: a slice of an operand.
        old: Share of the factor P.
        increment: Share of its increment dP.
    """

    values: Tensor
    old: float
    increment: float


class Factor(NamedTuple):
    """A LoRA factor that takes an AdamW step, and two outputs for the weight's product.

    `W_eff` moves by `s (dB A' + B dA)`: the outputs of B are `s dB` and `s B`, those of A are
    `A + dA` and `dA`. All tensors are float32, have one shape and contiguous rows.

    Attributes:
        values: A or B of one expert, moved in place.
        exp_avg: Its m.
        exp_avg_sq: Its v.
        step: The step's scalars.
        outputs: Where the operands go.
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Step
    outputs: tuple[Output, Output]


class LowRank(NamedTuple):
    """A routed weight that moves: `W <- kept W + left @ right`, minus the descent for `full`.

    Attributes:
        weight: [rows, cols], contiguous. For a transposed layer, whose weight is [in, out], pass
            `right.t()` as `left` and `left.t()` as `right`; nothing is copied.
        left: float32 [rows, K], any strides.
        right: float32 [K, cols], any strides.
        full: (m, v, the step's scalars) where `full` has won; None where it has not, and all of W
            is kept.
    """

    weight: Weight
    left: Tensor
    right: Tensor
    full: tuple[Tensor, Tensor, Step] | None = None
