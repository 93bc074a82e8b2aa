"""The CPU kernel of `torch.optim.AdamW(fused=True)`, split into its two halves.

The kernel updates m, v and a float32 parameter in one vectorised pass. MoLF updates the moments of
all experts first (`move`) and the weight of a winner later (`descend`). Both halves together give
the bits of torch's fused step (tried on x86 with AVX2 and AVX-512).
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

# Elements of a vector. The kernel computes the rest of a tensor one by one and may round it
# differently, so blocks of a tensor start at a multiple of this.
WIDTH = 16
# Step counter for which `beta ** step` is 0. Counters are on the CPU, also with another default
# device: with a counter elsewhere the kernel may do nothing, without an error.
_ENDLESS = torch.tensor(2.0**62, dtype=torch.float32, device="cpu")
_FIRST = torch.tensor(1.0, dtype=torch.float32, device="cpu")
# `1 - beta1` that leaves m unchanged in float32, with a gradient of zero.
_STILL = 2.0**-40
# For v to stay, the root of `1 - beta2` lies between this and its double: beta2 rounds to 1 in
# float32, and `1 - beta2` in float64 still represents every float32 root.
_LEAST_ROOT = 2.0**-14

Betas = tuple[float, float]


class Scratch:
    """Reused memory for the result of `move`; it stays in the cache."""

    # One object per step: a NaN that it holds would reach all later results.

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """Return `count` float32 numbers, finite unless an earlier result was not."""
        if self._memory is None or self._memory.numel() < count:
            self._memory = torch.zeros(count, dtype=torch.float32, device="cpu")
        return self._memory[:count]


def rows_of_whole_vectors(tensor: Tensor) -> int:
    """Return the multiple of rows at which blocks may start without a change of rounding."""
    row = tensor.numel() // len(tensor) if tensor.numel() and tensor.dim() else 1
    return WIDTH // math.gcd(WIDTH, row)


def fits(*tensors: Tensor) -> bool:
    """Return whether the kernel supports these tensors: contiguous float32 on the CPU."""
    # Exact types: the planner's fake tensors have no memory.
    return all(
        type(tensor) in (Tensor, Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and tensor.is_contiguous()
        and not tensor.is_neg()
        for tensor in tensors
    )


def move(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: Betas, eps: float, scratch: Scratch
) -> Tensor:
    """Update the moments of a block in place; return `m / (sqrt(v) + eps)`.

    Args:
        grad: float32, finite, contiguous, in the shape of the moments.
        exp_avg: m.
        exp_avg_sq: v.
        betas: Decay rates of the moments.
        eps: Added to the root.
        scratch: Memory of the result.

    Returns:
        The direction, in the shape of the block. The next call with this scratch overwrites it.
    """
    # The whole kernel on scratch as the parameter: decay clears it (lr = -1, wd = -1 keep 0 of it)
    # and the update leaves `m / (sqrt(v) + eps)`. Single operations read and write a block seven
    # times.
    _check_shapes(grad, exp_avg, exp_avg_sq)
    direction = scratch.take(exp_avg.numel()).view(exp_avg.shape)
    torch._fused_adamw_(
        [direction],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [_ENDLESS],
        lr=-1.0,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=-1.0,  # 1 - lr wd = 0
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return direction


def descend(
    values: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: float,
    correction: float,
    eps: float,
) -> None:
    """Update `p <- p - step_size m / (sqrt(v) / correction + eps)` in place, on one block.

    Args:
        values: p, contiguous float32.
        exp_avg: m, in the shape of p; keeps its bits.
        exp_avg_sq: v, in the shape of p; keeps its bits.
        step_size: `lr / (1 - b1^t)`.
        correction: `sqrt(1 - b2^t)`, more than 0 and at most 1.
        eps: Added to the root.
    """
    # The whole kernel with a gradient of zero and betas so near to 1 that m and v stay. Single
    # operations read and write a block four times.
    # At step 1 the kernel divides by the root of `1 - beta2`, which must be small for v to stay.
    # So numerator and denominator are scaled by the same power of two, which rounds nothing.
    _check_shapes(values, exp_avg, exp_avg_sq)
    mantissa, exponent = math.frexp(correction)
    rounded = round(mantissa * 2**24) / 2**24  # to float32, as the kernel would
    root, scale = 2 * _LEAST_ROOT * rounded, 2.0**exponent / (2 * _LEAST_ROOT)
    torch._fused_adamw_(
        [values],
        [_zeros_for(values)],
        [exp_avg],
        [exp_avg_sq],
        [],
        [_FIRST],
        lr=step_size * scale * _STILL,  # divided by 1 - beta1
        beta1=1 - _STILL,
        beta2=1 - root * root,
        weight_decay=0.0,
        eps=eps * scale,
        amsgrad=False,
        maximize=False,
    )


def adamw(
    values: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    weight_decay: float,
    betas: Betas,
    eps: float,
    step: int,
) -> None:
    """Take a whole AdamW step in place with the fused kernel."""
    _check_shapes(values, grad, exp_avg, exp_avg_sq)
    torch._fused_adamw_(
        [values],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(step, dtype=torch.float32, device="cpu")],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _check_shapes(*tensors: Tensor) -> None:
    """Refuse tensors of different shapes: the kernel would access memory out of bounds."""
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        raise RuntimeError(
            f"A step cannot use tensors of the shapes {', '.join(map(str, map(tuple, shapes)))}. "
            "Was the optimizer's state changed?"
        )


def _zeros_for(block: Tensor) -> Tensor:
    """Return shared zeros in the shape of a block; do not write to them."""
    count = max(1, block.numel())
    return _zeros(1 << (count - 1).bit_length())[: block.numel()].view(block.shape)


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32, device="cpu")
