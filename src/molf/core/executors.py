"""The executors by name."""

from __future__ import annotations

from molf.core.eager import Eager
from molf.core.executor import Executor


def executor_of(kernels: str) -> Executor:
    """Return the executor that a choice of `known_kernels` names; triton is imported if needed."""
    if kernels == "eager":
        return Eager()
    from molf.core.fused.executor import Triton

    return Triton()
