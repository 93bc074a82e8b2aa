"""Full precision for the optimizer's matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_types: Iterable[str]) -> Iterator[None]:
    """Compute products in the dtype of their operands: no TF32, no bf16 splitting, no autocast.

    Args:
        device_types: Device types of all tensors; autocast is set per type.
    """
    # The step's thin products are a small share of a training step. TF32 would drop 13 bits of
    # their mantissa.
    try:
        matmul_precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        # TrainingArguments(tf32=True) sets precision per backend (torch >= 2.9). Then torch raises
        # for the common getter.
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
    """Return the backends with a precision of their own (torch >= 2.9); none before."""
    candidates = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in candidates if hasattr(backend, "fp32_precision")]


def _restore(backend: Any, precision: str) -> None:
    """Restore a backend's precision; inherited ("none") if that gives the same."""
    if backend.fp32_precision != precision:
        backend.fp32_precision = "none"
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision
