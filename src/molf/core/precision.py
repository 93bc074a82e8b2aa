"""The precision of the optimizer's matrix products, whatever the training loop has set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_types: Iterable[str]) -> Iterator[None]:
    """Compute products in the dtype of their operands: no TF32, no bf16 splitting, no autocast.

    The thin products of the step (gradients of the factors, increments of the weight) are a small
    share of a training step; TF32 would cost them ten bits of mantissa.

    Args:
        device_types: Of all tensors that take part; autocast is a matter of each.
    """
    try:
        matmul_precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Set by backend (torch >= 2.9), as TrainingArguments(tf32=True) does. Torch then refuses
        # to answer for all backends at once.
        matmul_precision = None
    before = [(backend, backend.fp32_precision) for backend in _product_backends()]
    if matmul_precision is None:
        for backend, _ in before:
            backend.fp32_precision = "ieee"
    elif matmul_precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as without:
            for device_type in device_types:
                without.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:
        if matmul_precision not in (None, "highest"):
            torch.set_float32_matmul_precision(matmul_precision)
        for backend, precision in before:
            _restore(backend, precision)


def _product_backends() -> list[Any]:
    """Backends whose products torch >= 2.9 can set one by one; none before."""
    candidates = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in candidates if hasattr(backend, "fp32_precision")]


def _restore(backend: Any, precision: str) -> None:
    """Give a backend its precision back, inherited ("none") where that comes to the same."""
    if backend.fp32_precision != precision:
        backend.fp32_precision = "none"
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision
