"""What can run the step of an optimizer, by name, and how often it makes the host wait.

Only this file knows how the tests bring an executor about: a device that the host cannot read and a
second memory are not there on the CPU that runs the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from molf.core.arithmetic.blocks import Blocks
from molf.core.execute.eager import Eager
from offload_helpers import LateCarrier, carried_by

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Executor(NamedTuple):
    """Something that runs the step.

    Attributes:
        options: Keywords of the optimizer.
        around: Entered before the optimizer is made, left after its last step.
        run_by: Takes the place of the optimizer's own executor, if given.
        has_eager_bits: Whether the step has the bits of torch operations on whole tensors; else
            sums and products are rounded in another order.
        device: Of the model.
    """

    options: Mapping[str, Any] = MappingProxyType({})
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    run_by: Eager | None = None
    has_eager_bits: bool = True
    device: str = "cpu"

    @property
    def is_in_backward(self) -> bool:
        """Whether layers move before `step`, each as soon as its gradient is there."""
        return "optimizer_in_backward" in self.options


def never(device: torch.device) -> bool:
    """The host reads no tensor without waiting, as on an accelerator."""
    return False


@contextmanager
def late_carrier() -> Iterator[LateCarrier]:
    """A second memory beside that of the CPU; afterwards nothing may be left in it."""
    carrier = LateCarrier()
    with carried_by(lambda device: carrier):
        yield carrier
    assert carrier.now == 0


IN_BACKWARD = {"optimizer_in_backward": True}
OFFLOADED = {"state_offload": True}
EXECUTORS = {
    "eager": Executor(),
    "blocks": Executor(run_by=Eager(Blocks(cpu_elements=600)), has_eager_bits=False),
    "accelerator": Executor(run_by=Eager(can_read=never), has_eager_bits=False),
    "backward": Executor(IN_BACKWARD),
    "offload": Executor(OFFLOADED, late_carrier),
    "offload backward": Executor(OFFLOADED | IN_BACKWARD, late_carrier),
    # In a process of its own (fused/test_fused.py): Triton decides when it is imported whether it
    # interprets kernels or compiles them.
    "triton": Executor(
        {"kernels": "triton"}, has_eager_bits=False, device="cpu" if INTERPRETED else "cuda"
    ),
}


class ReadsOfTheHost(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))

    def _counted(self, method):
        def wrapper(*args, **kwargs):
            self.count += 1
            return method(*args, **kwargs)

        return wrapper

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")
        self.count += func.overloadpacket.__name__ in waiting
        return func(*args, **(kwargs or {}))
