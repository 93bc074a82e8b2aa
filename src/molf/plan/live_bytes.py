"""Counting the bytes of live tensors while operations run, on tensors with or without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside the context until nothing refers to them any more.

    Views share their storage and count once; tensors of the meta device count nothing. A kernel's
    own workspace, which is no tensor, is not seen.

    Args:
        known: Tensors that exist already and are not counted.
        scalar: What the host reads from a tensor without data, `None` if it must not read any.

    Attributes:
        now: Bytes of the counted storages that are alive.
        scalar: As given; it may be changed.
        peak: The most that `now` has been since the start or `reset_peak`.
        gradients: Bytes reported to `count_gradient` so far.
        gradients_at_peak: `gradients` when `peak` was reached.
    """

    def __init__(self, known: Iterable[Tensor] = (), scalar: float | None = None) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self.scalar = scalar
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._count(tensor, 0)

    def reset_peak(self) -> None:
        """Forget the peak, not what is alive."""
        self.peak = self.now

    def count_gradient(self, parameter: Tensor) -> None:
        """Note that a parameter has its gradient now; a post-accumulate-grad hook."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.scalar is not None:
            return self.scalar
        if func is torch.ops.aten.add.Tensor and _is_autograds_own():
            # Where two gradients of a tensor meet, autograd adds one to the other in place; but not
            # while a mode like this one is watching.
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value, value.untyped_storage().nbytes())
        return result

    def _count(self, tensor: Tensor, size: int) -> None:
        if tensor.device.type == "meta":  # what a plan keeps elsewhere
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients


def _is_autograds_own() -> bool:
    """Whether the engine of the backward pass calls, and neither user code nor a recomputation."""
    node = torch._C._current_autograd_node()  # the node whose result is handed on
    from_user = node is None or isinstance(node, torch.autograd.function.BackwardCFunction)
    # A leaf's node hands nothing on: it is an optimizer's hook that calls.
    is_leafs = node is not None and "AccumulateGrad" in node.name()
    return not (from_user or is_leafs or torch.is_grad_enabled())
