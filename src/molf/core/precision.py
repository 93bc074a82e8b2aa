"""The precision of the optimizer's matrix products, whatever the training loop has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute products in the dtype of their operands: no TF32, no bf16 splitting, no autocast.

    The thin products of the step (gradients of the factors, increments of the weight) are a small
    share of a training step; TF32 would cost them ten bits of mantissa.
    """
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(previous)
