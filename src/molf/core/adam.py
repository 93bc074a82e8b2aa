"""AdamW's arithmetic on tensors of any shape: moments, score terms, steps.

Tensors are worked through in blocks of rows. On a CPU a block fits the cache, so a chain of
elementwise operations reads and writes main memory once; elsewhere a block bounds the temporaries
of very large tensors. All arithmetic happens in float32, or float64 for float64 weights, whatever
the dtype of the weight, its gradient and the stored state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from molf.core import one_pass

# Torch gives each thread at least this many elements; the half dozen tensors of a chain then take
# 0.8 MB of its cache in float32.
_CPU_BLOCK_ELEMENTS_PER_THREAD = 65_536
_BLOCK_ELEMENTS = 1 << 25  # elsewhere: 128 MB in float32
_SCORE_EPS = 1e-8  # of the score, whatever the optimizer's own eps


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic for a weight: float64 for float64, else float32."""
    is_double = weight.dtype in (torch.float64, torch.complex128)
    return torch.float64 if is_double else torch.float32


def real_view(tensor: Tensor) -> Tensor:
    """Return the real and imaginary parts of a complex tensor, [..., 2]; others as they are.

    A complex number takes the steps of two real ones, as with `torch.optim.AdamW`.
    """
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums over whole tensors are kept: float64 where a device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def gradient(parameter: Tensor) -> Tensor:
    """Return the gradient of a parameter that has one, as `real_view` of what memory holds."""
    grad = parameter.grad
    assert grad is not None, "parameters without a gradient are left out of the step"
    if grad.is_complex() and grad.layout == torch.strided:
        grad = torch.view_as_real(grad.resolve_conj())
    # autograd may leave a view that is negated when it is read, or zeros without memory
    if grad._is_zerotensor():
        return grad.clone()
    return grad.resolve_neg() if grad.is_neg() else grad


def row_blocks(
    tensor: Tensor, *, at_least: int = 1, multiple: int = 1, stretch: int = 1
) -> Iterator[slice | EllipsisType]:
    """Yield indices of the first dimension that together cover `tensor`.

    Args:
        tensor: Any shape.
        at_least: Fewest rows of a block, where a matrix product needs some to be worth it.
        multiple: What the first row of every block is a multiple of.
        stretch: How many times larger blocks may be, because few tensors share the cache.
    """
    if not tensor.numel():
        return
    if tensor.dim() == 0:
        yield ...
        return
    elements = _BLOCK_ELEMENTS
    if tensor.device.type == "cpu":
        elements = _CPU_BLOCK_ELEMENTS_PER_THREAD * torch.get_num_threads()
    rows = tensor.shape[0]
    size = max(at_least, stretch * elements * rows // tensor.numel())
    size = -(-size // multiple) * multiple
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def cached_blocks(tensor: Tensor) -> Iterator[slice | EllipsisType]:
    """`row_blocks` of a tensor of which nothing is copied, for work that may be one pass."""
    # One pass is over four tensors: larger blocks of them still fit the cache.
    stretch = 2 if one_pass.fits(tensor) else 1
    multiple = one_pass.rows_of_whole_vectors(tensor)
    return row_blocks(tensor, multiple=multiple, stretch=stretch)


@dataclass(frozen=True)
class MomentDecay:
    """How moments move in this step, as scalars on the device.

    On an accelerator the host does not yet know whether every gradient is finite when moments are
    updated; `finite` knows, on the device. Where it is False, gradients are replaced by zeros and
    the moments multiplied by one, so that a bad step leaves the state bit for bit as it was.
    """

    betas: tuple[float, float]
    is_known_finite: bool  # to the host; then nothing need be asked of the device
    finite: Tensor  # bool
    new_share: Tensor  # 1 - beta1, or 0
    kept_sq: Tensor  # beta2, or 1
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
        """Build from the betas and a 0-dim bool tensor on the gradients' device."""
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
    """`m <- b1 m + (1 - b1) g`, `v <- b2 v + (1 - b2) g*g`, in place, on one block."""
    if _in_one_pass(exp_avg, exp_avg_sq, decay):
        _move_in_one_pass(grad, exp_avg, exp_avg_sq, decay)
        return
    grad = torch.where(decay.finite, grad, 0.0).to(exp_avg.dtype)
    exp_avg.lerp_(grad, decay.new_share)
    exp_avg_sq.mul_(decay.kept_sq).addcmul_(grad, grad, value=decay.new_sq)


def score_terms(exp_avg: Tensor, exp_avg_sq: Tensor, score: str) -> Tensor:
    """Return the summands of a score, elementwise, on one block.

    EPD (Eq. 10): `m^2 / (sqrt(v) + eps)`. PFN (Eq. 11): `(m / (sqrt(v) + eps))^2`.
    """
    preconditioned = exp_avg / exp_avg_sq.sqrt().add_(_SCORE_EPS)
    return preconditioned.square_() if score == "pfn" else preconditioned.mul_(exp_avg)


def update_and_score(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    decay: MomentDecay,
    score: str,
) -> Tensor:
    """`update_moments` on one block; return the sum of the score's terms, 0-dim."""
    if not _in_one_pass(exp_avg, exp_avg_sq, decay):
        update_moments(grad, exp_avg, exp_avg_sq, decay)
        return score_terms(exp_avg, exp_avg_sq, score).sum()
    direction = _move_in_one_pass(grad, exp_avg, exp_avg_sq, decay).view(-1)
    return torch.dot(direction, direction if score == "pfn" else exp_avg.view(-1))


def update_and_score_columns(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: MomentDecay, score: str
) -> Tensor:
    """`update_moments` on one block; return the sums of the score's terms over its rows."""
    if not _in_one_pass(exp_avg, exp_avg_sq, decay):
        update_moments(grad, exp_avg, exp_avg_sq, decay)
        return score_terms(exp_avg, exp_avg_sq, score).sum(0)
    direction = _move_in_one_pass(grad, exp_avg, exp_avg_sq, decay)
    return direction.mul_(direction if score == "pfn" else exp_avg).sum(0)


def _in_one_pass(exp_avg: Tensor, exp_avg_sq: Tensor, decay: MomentDecay) -> bool:
    return decay.is_known_finite and one_pass.fits(exp_avg, exp_avg_sq)


def _move_in_one_pass(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: MomentDecay
) -> Tensor:
    grad = grad.to(exp_avg.dtype).contiguous()
    return one_pass.move(grad, exp_avg, exp_avg_sq, decay.betas, _SCORE_EPS, decay.scratch)


def finish_score(total: float, *, score: str, lr: float, count: int) -> float:
    """Turn the sum of an expert's terms over its `count` parameters into its score."""
    return math.sqrt(total / count) if score == "pfn" else lr * total / count


@dataclass(frozen=True)
class AdamWStep:
    """The scalars of one tensor's AdamW step with decoupled decay.

    Attributes:
        lr: The scheduled rate.
        weight_decay: The decay, multiplied by `lr` in the step.
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
        """`lr wd`, the share of a weight that decay takes."""
        return self.lr * self.weight_decay

    @property
    def kept(self) -> float:
        """`1 - lr wd`, the share that decay leaves."""
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
        """`sqrt(v) / sqrt(1 - b2^t) + eps`."""
        return exp_avg_sq.sqrt().div_(self.correction).add_(self.eps)

    def descend_(
        self, values: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, scale: float = 1.0
    ) -> None:
        """`p <- p - lr m^ / (sqrt(v^) + eps)` in place, on one block; decay is the caller's.

        Args:
            values: What moves, `scale * p`, in the moments' dtype.
            exp_avg: m, of the gradient of p.
            exp_avg_sq: v, of the gradient of p.
            scale: How p is stored.
        """
        step_size = self.step_size * scale
        in_one_pass = one_pass.fits(values, exp_avg, exp_avg_sq)
        for rows in cached_blocks(values):  # what is a block for a product may be larger
            block = values[rows], exp_avg[rows], exp_avg_sq[rows]
            if in_one_pass:
                one_pass.descend(
                    *block, step_size=step_size, correction=self.correction, eps=self.eps
                )
            else:
                block[0].addcdiv_(block[1], self.denominator(block[2]), value=-step_size)

    def increment(self, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
        """Return `p' - p`, decay included, without the cancellation of a difference."""
        direction = weight * -self.decay
        self.descend_(direction, exp_avg, exp_avg_sq)
        return direction
