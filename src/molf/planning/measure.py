"""Measure the peak of live tensors, with CUDA's allocator or torch's profiler (CPU)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class PeakBytes:
    """Measures the peak memory of tensors inside the context.

    On CUDA this is `max_memory_allocated`. On a CPU, torch's profiler records each allocation and
    release, including temporaries of kernels, of the entering thread and its autograd threads.

    Args:
        device: The device of the tensors.
        held: On a CPU, the tensors alive when the context is entered (`held_tensors`).

    Attributes:
        bytes: The peak, after the context.
    """

    def __init__(self, device: torch.device, held: Iterable[Tensor] = ()) -> None:
        self._device = device
        # By storage: tied weights and views count once.
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
        self._before = sum(storages.values())
        self._profiler: Any = None
        self.bytes = 0

    def __enter__(self) -> PeakBytes:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints to standard error
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
        # Threads record events in their own order.
        for _, change in sorted(changes, key=lambda event: event[0]):
            now += change
            self.bytes = max(self.bytes, now)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield a model's parameters and buffers, and the scales of bitsandbytes' weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        beside = vars(getattr(parameter, "quant_state", None) or parameter)
        yield from (value for value in beside.values() if isinstance(value, Tensor))
