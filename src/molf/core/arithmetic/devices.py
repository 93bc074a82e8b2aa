"""Host access to devices: which memory the host reads without waiting, and uploads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CanRead = Callable[[torch.device], bool]
"""Whether the host reads a tensor on a device without waiting."""


def is_host_memory(device: torch.device) -> bool:
    """Return whether the host reads a tensor on this device without waiting."""
    return device.type == "cpu"


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the CPU to a device; the host does not wait.

    Args:
        values: On the CPU (torch's default device may be another one).
        device: The destination.
    """
    # A copy from pageable memory would make the host wait.
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
