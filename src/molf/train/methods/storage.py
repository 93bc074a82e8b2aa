"""Storage and executor options of the methods that train dense weights."""

from __future__ import annotations

from typing import Any

import torch

from molf.core.kernels import check_kernel_device
from molf.errors import InputError
from molf.train.resolved import ResolvedSettings


def storage_options(settings: ResolvedSettings) -> dict[str, Any]:
    """The keywords of `MoLFAdamW` and `AdamW` for precision, memory and kernels."""
    return {
        "weight_rounding": settings.weight_rounding,
        "state_dtype": settings.state_dtype,
        "grad_accumulation_dtype": settings.grad_accumulation_dtype,
        "optimizer_in_backward": settings.optimizer_in_backward,
        "state_offload": settings.state_offload,
        "kernels": settings.kernels,
    }


def is_plain(settings: ResolvedSettings) -> bool:
    """Whether nothing beyond float32 weights and state, computed by torch, is wanted."""
    return (
        settings.dtype == "float32"
        and settings.state_dtype == "float32"
        and not settings.optimizer_in_backward
        and not settings.state_offload
        and settings.kernels == "eager"
    )


def check_kernels(settings: ResolvedSettings, device: torch.device) -> None:
    """Check that the requested kernels run on the device.

    Raises:
        InputError: They do not.
    """
    if settings.kernels == "triton":
        try:
            check_kernel_device(device, "the training")
        except ValueError as error:
            raise InputError(str(error)) from error
