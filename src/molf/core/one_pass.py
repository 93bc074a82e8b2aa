"""Moments and the direction of a step in one pass over memory, on a CPU.

`torch.optim.AdamW(fused=True)` has a kernel that moves m, v and a parameter in one vectorised pass.
Here it gets scratch for the parameter, the rate -1, a decay that leaves nothing of what was there,
and a counter so large that no bias correction is left: what it writes into the scratch is
`m / (sqrt(v) + eps)`, of which a score is made. The same from single operations reads and writes a
block seven times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The last elements of a tensor, which fill no vector, the kernel computes one by one and rounds
# otherwise than torch's other operations; they are left to those.
WIDTH = 16
# Steps: `beta ** step` is 0. On the CPU whatever the default device: beside a counter that is
# elsewhere the kernel may do nothing at all, without an error.
_ENDLESS = torch.tensor(2.0**62, device="cpu")

Betas = tuple[float, float]


class Scratch:
    """Memory for the directions of one block after the other, which stays in the cache.

    It belongs to one step: what a moment of NaN has left there would spoil all that follows.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return `count` numbers, finite unless a direction was not."""
        if self._memory is None or self._memory.numel() < count:
            self._memory = torch.zeros(count, dtype=dtype, device="cpu")
        return self._memory[:count]


def rows_of_whole_vectors(tensor: Tensor) -> int:
    """What the first row of a block must be a multiple of, for blocks to change no rounding."""
    row = tensor.numel() // len(tensor) if tensor.numel() and tensor.dim() else 1
    return WIDTH // math.gcd(WIDTH, row)


def fits(tensor: Tensor) -> bool:
    """Whether the kernel can have a moment; it takes elements in order of memory."""
    # Fake tensors, by which memory is planned, share nothing with real ones.
    return type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()


def move(
    grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: Betas, eps: float, scratch: Scratch
) -> Tensor:
    """Move the moments of a block in place; return `m / (sqrt(v) + eps)`, in the block's shape.

    Args:
        grad: In the moments' dtype, contiguous like them; finite.
        exp_avg: m.
        exp_avg_sq: v.
        betas: Decay rates of the moments.
        eps: Added to the root.
        scratch: Where the result is; always of the same dtype.

    Returns:
        Memory that the next call with this scratch overwrites.
    """
    count = exp_avg.numel()
    direction = scratch.take(count, exp_avg.dtype).view(exp_avg.shape)
    block = [direction, grad, exp_avg, exp_avg_sq]
    even = count - count % WIDTH
    if even < count:
        flat = [x.view(-1) for x in block]
        _one_by_one([x[even:] for x in flat], betas, eps)
        block = [x[:even] for x in flat]
    if even:
        _kernel(block, betas, eps)
    return direction


def _kernel(block: list[Tensor], betas: Betas, eps: float) -> None:
    direction, grad, exp_avg, exp_avg_sq = block
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


def _one_by_one(block: list[Tensor], betas: Betas, eps: float) -> None:
    direction, grad, exp_avg, exp_avg_sq = block
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    torch.div(exp_avg, exp_avg_sq.sqrt().add_(eps), out=direction)
