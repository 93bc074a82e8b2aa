"""Choice of the executor by name."""

from __future__ import annotations

from molf.core.eager import Eager
from molf.core.executor import Executor


def executor_of(kernels: str) -> Executor:
    """Return the executor for "eager" or "triton"."""
    if kernels == "eager":
        return Eager()
    # Imported here: eager steps run without triton installed.
    from molf.core.fused.executor import Triton

    return Triton()
