"""Steps on a CPU in one pass over memory each: moments with a direction, and a descent.

`torch.optim.AdamW(fused=True)` has a kernel that moves m, v and a float32 parameter in one
vectorised pass. MoLF needs its halves, because a score lies between them: first the moments of all
experts move, and later the weight of a winner. Each half is the whole kernel with something that
does not count: `move` gives it scratch for the parameter, `descend` a gradient of zero and moments
that stay. The same from single operations reads and writes a block seven times, and four.

Both halves together are torch's fused step, bit for bit.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

# The kernel computes the last elements of a tensor, which fill no vector, one by one and may round
# them otherwise: blocks of a tensor begin where vectors do.
WIDTH = 16
# Steps: `beta ** step` is 0. Counters are on the CPU whatever the default device: beside one that
# is elsewhere the kernel may do nothing at all, without an error.
_ENDLESS = torch.tensor(2.0**62, device="cpu")
_FIRST = torch.tensor(1.0, device="cpu")
# `1 - beta1` of a first moment that stays: beside a gradient of zero a float32 does not feel it.
_STILL = 2.0**-40
# The root of `1 - beta2` of a second moment that stays lies between this and its double: then beta2
# rounds to one in float32, and `1 - beta2` has digits enough for the root to be any float32.
_LEAST_ROOT = 2.0**-14

Betas = tuple[float, float]


class Scratch:
    """Memory for the directions of one block after the other, which stays in the cache.

    It belongs to one step: what a moment of NaN has left there would spoil all that follows.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """Return `count` numbers, finite unless a direction was not."""
        if self._memory is None or self._memory.numel() < count:
            self._memory = torch.zeros(count, dtype=torch.float32, device="cpu")
        return self._memory[:count]


def rows_of_whole_vectors(tensor: Tensor) -> int:
    """What the first row of a block must be a multiple of, for blocks to change no rounding."""
    row = tensor.numel() // len(tensor) if tensor.numel() and tensor.dim() else 1
    return WIDTH // math.gcd(WIDTH, row)


def fits(*tensors: Tensor) -> bool:
    """Whether the kernel can have these; it takes elements in order of memory."""
    # Fake tensors, by which memory is planned, share nothing with real ones.
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
    """Move the moments of a block in place; return `m / (sqrt(v) + eps)`, in the block's shape.

    Args:
        grad: float32, contiguous like the moments; finite.
        exp_avg: m.
        exp_avg_sq: v.
        betas: Decay rates of the moments.
        eps: Added to the root.
        scratch: Where the result is.

    Returns:
        Memory that the next call with this scratch overwrites.
    """
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
    """`p <- p - step_size m / (sqrt(v) / correction + eps)` in place, on one block.

    The kernel divides by the root of `1 - beta2 ** step` and knows no other correction. At the
    first step that is the root of `1 - beta2`, which has to be small for v to stay. So all of the
    fraction is scaled by the same power of two, which rounds nothing.

    Args:
        values: p.
        exp_avg: m; written, as it was.
        exp_avg_sq: v; written, as it was.
        step_size: `lr / (1 - b1^t)`.
        correction: `sqrt(1 - b2^t)`, more than 0 and at most 1.
        eps: Added to the root.
    """
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
    """Take a whole AdamW step in place, which is what the kernel is for."""
    _check_shapes(values, grad, exp_avg, exp_avg_sq)
    torch._fused_adamw_(
        [values],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(step), device="cpu")],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _check_shapes(*tensors: Tensor) -> None:
    """Refuse tensors of several shapes: the kernel would read and write past their ends."""
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        raise RuntimeError(
            f"A step cannot use tensors of the shapes {', '.join(map(str, map(tuple, shapes)))}. "
            "Was the optimizer's state changed?"
        )


def _zeros_for(block: Tensor) -> Tensor:
    """Zeros in the shape of a block; nothing writes to them."""
    count = max(1, block.numel())
    return _zeros(1 << (count - 1).bit_length())[: block.numel()].view(block.shape)


@cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float32, device="cpu")
