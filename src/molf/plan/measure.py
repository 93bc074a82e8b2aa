"""The measured peak of live tensors: on CUDA its allocator's, on a CPU that of torch's profiler."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class PeakBytes:
    """Measures the most bytes that tensors take inside the context.

    On CUDA that is `max_memory_allocated`. On a CPU every allocation and release of torch's
    allocator is recorded by torch's profiler, kernels' temporaries included, and added to what was
    there before. Only the thread that enters is seen, and those that it starts for autograd.

    Args:
        device: Where the tensors are.
        held: On a CPU, tensors that are there when the context is entered (`held_tensors`).

    Attributes:
        bytes: The peak, once the context is left.
    """

    def __init__(self, device: torch.device, held: Iterable[Tensor] = ()) -> None:
        self._device = device
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
        self._before = sum(storages.values())
        self._profiler: Any = None
        self.bytes = 0

    def __enter__(self) -> PeakBytes:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to standard error else
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU],
                profile_memory=True,
                acc_events=True,
            )
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profiler is None:
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._profiler.__exit__(*error)
        events = self._profiler.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        now = self.bytes = self._before
        for _, change in sorted(changes, key=lambda event: event[0]):
            now += change
            self.bytes = max(self.bytes, now)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield a model's parameters and buffers, and what bitsandbytes keeps beside its weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        beside = vars(getattr(parameter, "quant_state", None) or parameter)
        yield from (value for value in beside.values() if isinstance(value, Tensor))
