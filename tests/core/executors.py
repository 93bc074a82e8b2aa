"""What can run the step of an optimizer, by name, and how often it makes the host wait.

Only this file knows how the tests bring an executor about: block sizes, a device that the host
cannot read, and a second memory are not there on the CPU that runs the tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from offload_helpers import LateCarrier
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from molf.core import adam, factors, guard
from molf.core.offload import carried_by

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Executor(NamedTuple):
    """Something that runs the step.

    Attributes:
        options: Keywords of the optimizer.
        around: Entered before the optimizer is made, left after its last step.
        has_eager_bits: Whether the step has the bits of torch operations on whole tensors; else
            sums and products are rounded in another order.
        device: Of the model.
    """

    options: Mapping[str, Any] = MappingProxyType({})
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    has_eager_bits: bool = True
    device: str = "cpu"

    @property
    def is_in_backward(self) -> bool:
        """Whether layers move before `step`, each as soon as its gradient is there."""
        return "optimizer_in_backward" in self.options


@contextmanager
def blocks_of(elements: int) -> Iterator[None]:
    """Tensors are worked through in blocks of about this many elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adam, "_CPU_BLOCK_ELEMENTS_PER_THREAD", elements)
        yield


@contextmanager
def host_reads(*, at_once: bool) -> Iterator[None]:
    """Whether the host knows at once what is on the device, as of a CPU, or has to wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (guard, factors):
            patch.setattr(module, "reads_for_nothing", lambda device: at_once)
        yield


@contextmanager
def late_carrier() -> Iterator[LateCarrier]:
    """A second memory beside that of the CPU; afterwards nothing may be left in it."""
    carrier = LateCarrier()
    with carried_by(lambda device: carrier):
        yield carrier
    assert carrier.now == 0


_USUAL_BLOCK = adam._CPU_BLOCK_ELEMENTS_PER_THREAD


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """As things are on a CPU, whatever else is in force."""
    with blocks_of(_USUAL_BLOCK), host_reads(at_once=True):
        yield


def as_an_accelerator() -> AbstractContextManager[None]:
    """A device that the host waits for."""
    return host_reads(at_once=False)


IN_BACKWARD = {"optimizer_in_backward": True}
OFFLOADED = {"state_offload": True}
EXECUTORS = {
    "eager": Executor({}, on_a_cpu),
    "blocks": Executor({}, lambda: blocks_of(600), has_eager_bits=False),
    "accelerator": Executor({}, as_an_accelerator, has_eager_bits=False),
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
