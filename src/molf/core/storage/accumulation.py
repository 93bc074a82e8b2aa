"""Accumulation of low-precision gradients in float32."""

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
    """Set the dtype of gradients to float32 for parameters below float32; convert existing ones.

    Each micro-batch's gradient is computed in the parameter's dtype and added in float32. It costs
    two more bytes per element of a bfloat16 parameter.

    Raises:
        ImportError: torch has no `grad_dtype`.
    """
    # Clipping and the step then use float32 sums.
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
        parameter.grad = None  # torch refuses the change while a gradient of another dtype exists
        parameter.grad_dtype = torch.float32
        parameter.grad = None if grad is None else grad.float()
