"""The executors by name."""

from __future__ import annotations

from molf.core.eager import Eager
from molf.core.executor import Executor


def executor_of(kernels: str) -> Executor:
    """Return the executor of this name in `options.KERNELS`; imports triton if needed."""
    if kernels == "eager":
        return Eager()
    from molf.core.fused.executor import Triton

    return Triton()
