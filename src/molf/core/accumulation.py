"""Gradients of low-precision parameters, accumulated over micro-batches in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def has_grad_dtype() -> bool:
    """Whether torch lets a gradient have another dtype than its parameter."""
    return hasattr(torch.Tensor, "grad_dtype")


def accumulate_in_float32(parameters: Iterable[Tensor]) -> None:
    """Have the gradients of parameters below float32 kept in float32.

    Each micro-batch's gradient is computed in the parameter's dtype and added in float32; clipping
    and the step then see float32 gradients. This costs two more bytes for every element of a
    bfloat16 parameter.

    Raises:
        ImportError: torch is too old.
    """
    low = [p for p in parameters if p.dtype.itemsize < 4 and p.requires_grad]
    if low and not has_grad_dtype():
        raise ImportError(
            f"grad_accumulation_dtype='float32' needs a torch whose parameters have grad_dtype; "
            f"{torch.__version__} has none. Update torch, or use float32 weights."
        )
    for parameter in low:
        if parameter.grad is not None:
            parameter.grad = None  # of the other dtype; torch refuses the change beside it
        parameter.grad_dtype = torch.float32
