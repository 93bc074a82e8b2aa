"""Check that the Triton kernels run on the device of a training."""

from __future__ import annotations

import torch

from molf.core.execute.kernel_checks import check_kernel_device
from molf.errors import InputError
from molf.job.settings.resolved import ResolvedSettings


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
