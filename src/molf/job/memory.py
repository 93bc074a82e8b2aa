"""Measure the memory of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

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


def memory_figures(device: torch.device) -> dict[str, int]:
    """Return the memory in bytes for the log: its peak up to now, and that of this moment.

    What cannot be measured here is absent. The memory is that of `peak_memory`; neither waits for
    the device.
    """
    now = _memory(device)
    # Linux counts both in batches, so the peak may lag behind by some pages.
    found = {"peak_memory_bytes": max(peak_memory(device)[0], now), "memory_bytes": now}
    return {name: value for name, value in found.items() if value}


def _memory(device: torch.device) -> int:
    """Return the memory of this moment; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(resident) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux
        return 0
