"""Gradients of low-precision parameters, accumulated over micro-batches in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def has_grad_dtype() -> bool:
    """Return whether torch lets a gradient have another dtype than its parameter."""
    return hasattr(torch.Tensor, "grad_dtype")


def is_low(parameter: Tensor) -> bool:
    """Return whether a parameter is trained in less than float32."""
    return parameter.dtype.itemsize < 4 and parameter.requires_grad


def accumulate_in_float32(parameters: Iterable[Tensor]) -> None:
    """Have the gradients of parameters below float32 kept in float32, those there are included.

    Each micro-batch's gradient is computed in the parameter's dtype and added in float32; clipping
    and the step then see float32 gradients. This costs two more bytes for every element of a
    bfloat16 parameter. Parameters for which it is so already are left alone.

    Raises:
        ImportError: torch is too old.
    """
    low: list[Any] = [p for p in parameters if is_low(p)]
    if low and not has_grad_dtype():
        raise ImportError(
            f"grad_accumulation_dtype='float32' needs a torch whose parameters have grad_dtype; "
            f"{torch.__version__} has none. Update torch, or use float32 weights."
        )
    for parameter in low:
        if parameter.grad_dtype == torch.float32:
            continue
        grad = parameter.grad
        parameter.grad = None  # torch refuses the change beside a gradient of the other dtype
        parameter.grad_dtype = torch.float32
        parameter.grad = None if grad is None else grad.float()
