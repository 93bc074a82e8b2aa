"""AdamW's arithmetic on one block of a tensor: moments, score terms, updates.

It is in float32 (float64 for float64 weights) for every dtype of weight, gradient and state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molf.core.arithmetic import one_pass
from molf.core.arithmetic.blocks import BLOCKS, Blocks
from molf.core.scores.score import SCORE_EPS, Block, ScoreTerm

Terms = Sequence[ScoreTerm]
"""Terms of a score."""


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic for a weight: float64 for float64, else float32."""
    is_double = weight.dtype in (torch.float64, torch.complex128)
    return torch.float64 if is_double else torch.float32


def real_view(tensor: Tensor) -> Tensor:
    """Return the real and imaginary parts of a complex tensor, [..., 2]; others unchanged.

    A complex number takes the steps of two real numbers, as in `torch.optim.AdamW`.
    """
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums over whole tensors: float64, if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter, as `real_view` and without lazy negation."""
    grad = parameter.grad
    assert grad is not None, "parameters without a gradient are left out of the step"
    if grad.is_complex() and grad.layout == torch.strided:
        grad = torch.view_as_real(grad.resolve_conj())
    # Autograd may return a lazily negated view, or a zero tensor without memory.
    if grad._is_zerotensor():
        return grad.clone()
    return grad.resolve_neg() if grad.is_neg() else grad


@dataclass(frozen=True)
class MomentDecay:
    """Scalars of the moments' update, on the device."""

    # On an accelerator the host has not read `finite` when moments are updated. If it is False,
    # the update multiplies moments by 1 and gradients by 0: the state keeps every bit.
    betas: tuple[float, float]
    is_known_finite: bool  # the host has read that `finite` is True
    finite: Tensor  # 0-dim bool
    new_share: Tensor  # 1 - beta1; 0 if not finite
    kept_sq: Tensor  # beta2; 1 if not finite
    new_sq: float  # 1 - beta2
    scratch: one_pass.Scratch

    @classmethod
    def of(
        cls,
        betas: tuple[float, float],
        finite: Tensor,
        dtype: torch.dtype,
        *,
        is_known_finite: bool = False,
    ) -> MomentDecay:
        """Build from the betas and a 0-dim bool on the gradients' device."""
        beta1, beta2 = betas
        share = torch.full((), 1 - beta1, dtype=dtype, device=finite.device)
        kept = torch.full((), beta2, dtype=dtype, device=finite.device)
        return cls(
            betas,
            is_known_finite,
            finite,
            torch.where(finite, share, 0.0),
            torch.where(finite, kept, 1.0),
            1 - beta2,
            one_pass.Scratch(),
        )


def update_moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: MomentDecay) -> None:
    """Update `m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g*g` in place, on one block."""
    update_and_score(grad, exp_avg, exp_avg_sq, decay, ())


def update_and_score(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: MomentDecay,
    terms: Terms,
    *,
    by_column: bool = False,
) -> list[Tensor]:
    """Update moments of one block; return the sum of each term.

    Args:
        grad: Gradient of the block.
        exp_avg: m, updated in place.
        exp_avg_sq: v, updated in place.
        decay: Scalars of the update.
        terms: Terms to sum.
        by_column: Whether to sum over rows alone, of a block [rows, R].

    Returns:
        A 0-dim tensor per term; [R] by column.
    """
    is_one_pass = decay.is_known_finite and one_pass.fits(exp_avg, exp_avg_sq)
    if is_one_pass:
        grad = grad.to(exp_avg.dtype).contiguous()
    else:
        grad = torch.where(decay.finite, grad, 0.0).to(exp_avg.dtype)
    # A dot product takes one pass, but needs contiguous blocks.
    reduce = _sum_of_columns if by_column else _dot if is_one_pass else _sum
    sums = [
        reduce(*term.factors(Block(grad, exp_avg, exp_avg_sq))) if term.is_before else None
        for term in terms
    ]
    direction = None
    if is_one_pass:
        direction = one_pass.move(grad, exp_avg, exp_avg_sq, decay.betas, SCORE_EPS, decay.scratch)
    else:
        exp_avg.lerp_(grad, decay.new_share)
        exp_avg_sq.mul_(decay.kept_sq).addcmul_(grad, grad, value=decay.new_sq)
    after = Block(grad, exp_avg, exp_avg_sq, direction)
    return [
        reduce(*term.factors(after)) if early is None else early
        for term, early in zip(terms, sums, strict=True)
    ]


def _product(first: Tensor, second: Tensor | None = None) -> Tensor:
    return first if second is None else first * second


def _sum(*factors: Tensor) -> Tensor:
    return _product(*factors).sum()


def _sum_of_columns(*factors: Tensor) -> Tensor:
    return _product(*factors).sum(0)


def _dot(first: Tensor, second: Tensor | None = None) -> Tensor:
    if second is None:
        return first.sum()
    # A term of the user may multiply by a mask, or by float64; `torch.dot` takes one dtype.
    if first.dtype != second.dtype or not first.is_floating_point():
        return _sum(first, second)
    return torch.dot(first.reshape(-1), second.reshape(-1))


@dataclass(frozen=True)
class AdamWStep:
    """The scalars of one tensor's AdamW step with decoupled decay.

    Attributes:
        lr: The scheduled rate.
        weight_decay: Decoupled decay; a step multiplies it by `lr`.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment.
        step: The counter t, 1 at the first step.
    """

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    step: int

    @property
    def decay(self) -> float:
        """`lr wd`."""
        return self.lr * self.weight_decay

    @property
    def kept(self) -> float:
        """`1 - lr wd`."""
        return 1 - self.decay

    @property
    def step_size(self) -> float:
        """`lr / (1 - b1^t)`."""
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def correction(self) -> float:
        """`sqrt(1 - b2^t)`."""
        return math.sqrt(1 - self.betas[1] ** self.step)

    def denominator(self, exp_avg_sq: Tensor) -> Tensor:
        """Return `sqrt(v) / sqrt(1 - b2^t) + eps`."""
        return exp_avg_sq.sqrt().div_(self.correction).add_(self.eps)

    def descend_(
        self,
        values: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        scale: float = 1.0,
        blocks: Blocks = BLOCKS,
    ) -> None:
        """Update `p <- p - lr m^ / (sqrt(v^) + eps)` in place, without decay.

        Args:
            values: `scale * p`, in the moments' dtype.
            exp_avg: m of p, in the shape of `values`.
            exp_avg_sq: v of p, in the shape of `values`.
            scale: `values` holds `scale` times p.
            blocks: Sizes of blocks.
        """
        step_size = self.step_size * scale
        in_one_pass = one_pass.fits(values, exp_avg, exp_avg_sq)
        for rows in blocks.cached(values):  # a block of a product may be larger
            block = values[rows], exp_avg[rows], exp_avg_sq[rows]
            if in_one_pass:
                one_pass.descend(
                    *block, step_size=step_size, correction=self.correction, eps=self.eps
                )
            else:
                block[0].addcdiv_(block[1], self.denominator(block[2]), value=-step_size)

    def increment(
        self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, blocks: Blocks = BLOCKS
    ) -> Tensor:
        """Return `p' - p`, decay included."""
        # Built up from zero: the difference `p' - p` would cancel.
        direction = weight * -self.decay
        self.descend_(direction, exp_avg, exp_avg_sq, blocks=blocks)
        return direction
