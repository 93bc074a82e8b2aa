"""The most memory that a run needed."""

from __future__ import annotations

import sys

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Start counting, where the device counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the peak in bytes and what it is the peak of.

    On CUDA it is what tensors took; elsewhere the resident memory of the whole process since it
    started, libraries and evaluations included. Windows does not tell (0).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA tensors"
    if sys.platform == "win32":
        return 0, "unknown"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "process"
