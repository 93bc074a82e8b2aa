"""Devices and the host: which memory the host reads, and how it sends numbers."""

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
    """Copy to the device without waiting for it: CUDA reads pinned memory when it gets there.

    Args:
        values: On the CPU, which is not always torch's default device.
        device: The destination.
    """
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)
