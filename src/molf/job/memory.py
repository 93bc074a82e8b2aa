"""Measure the peak memory of a run."""

from __future__ import annotations

import sys

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak of a CUDA device; no-op elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the peak in bytes, and the name of the measure.

    On CUDA, the memory of tensors. Elsewhere, the resident memory of the process since its start,
    including libraries and evaluations. On Windows it is not known (0).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA tensors"
    if sys.platform == "win32":
        return 0, "unknown"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "process"
