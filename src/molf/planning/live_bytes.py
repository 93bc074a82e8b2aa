"""Count the bytes of live tensors while operations run, on tensors with or without data."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made inside the context, until they are freed.

    Views share a storage and count once. Tensors on the meta device are not counted, nor are
    workspaces of kernels, which are no tensors.

    Args:
        known: Existing tensors, which are not counted.
        scalar: The value that `.item()` returns for a tensor without data; None to forbid reads.

    Attributes:
        now: Bytes of the counted storages that are alive.
        scalar: As given; may be changed.
        peak: The maximum of `now` since the start or `reset_peak`.
        gradients: Bytes reported to `count_gradient` so far.
        gradients_at_peak: `gradients` when `peak` was reached.
    """

    def __init__(self, known: Iterable[Tensor] = (), scalar: float | None = None) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.gradients_at_peak = 0
        self.scalar = scalar
        self._seen: dict[int, weakref.ref[Any]] = {}
        # With size 0: they are recognised and never subtracted.
        for tensor in known:
            self._count(tensor, 0)

    def reset_peak(self) -> None:
        """Set the peak to the bytes alive now."""
        self.peak = self.now

    def count_gradient(self, parameter: Tensor) -> None:
        """Add the bytes of a parameter's gradient; a post-accumulate-grad hook."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.scalar is not None:
            return self.scalar
        if func is torch.ops.aten.add.Tensor and _is_autograd():
            # Autograd adds two gradients of a tensor in place, but out of place under a dispatch
            # mode. Adding in place here gives the memory of a training without the mode.
            func = torch.ops.aten.add_.Tensor
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value, value.untyped_storage().nbytes())
        return result

    def _count(self, tensor: Tensor, size: int) -> None:
        if tensor.device.type == "meta":  # a plan's host memory
            return
        storage = tensor.untyped_storage()
        # The address identifies a storage: Python objects of it come and go.
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


def _is_autograd() -> bool:
    """Return whether the autograd engine runs the operation, not user code or a recomputation."""
    node = torch._C._current_autograd_node()  # the node whose gradients are accumulated
    from_user = node is None or isinstance(node, torch.autograd.function.BackwardCFunction)
    # In a leaf's node, the operations are those of an optimizer's hook.
    is_hook = node is not None and "AccumulateGrad" in node.name()
    return not (from_user or is_hook or torch.is_grad_enabled())
