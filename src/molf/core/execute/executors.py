"""Choice of the executor by name."""

from __future__ import annotations

from molf.core.execute.eager import Eager
from molf.core.step.executor import Executor


def executor_of(kernels: str) -> Executor:
    """Return the executor for "eager" or "triton"."""
    if kernels == "eager":
        return Eager()
    # Imported here: eager steps run without triton installed.
    from molf.core.execute.triton.executor import Triton

    return Triton()
