"""Checks for `kernels="triton"`: unsupported parameters and options are refused, without fallback.

triton is imported only with `kernels="triton"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molf.core.model.groups import parameter_name
from molf.core.options import check_exclusions

_DTYPES = (torch.float32, torch.bfloat16)


def check_kernel_group(group: dict[str, Any], number: int, home: torch.device) -> None:
    """Refuse a parameter group that the kernels do not support.

    Args:
        group: Group with all defaults.
        number: Number of the group in the optimizer.
        home: Device of the optimizer's first trained parameter.

    Raises:
        ValueError: With the remedy.
    """
    check_float32_moments(group)
    if group.get("adapter_scaling") is not None:
        raise ValueError(
            "kernels='triton' does not support LoRA experts in a PEFT adapter (freeze_base, "
            "lora_dropout). Leave kernels out, or train the plain model without dropout."
        )
    for index, parameter in enumerate(group["params"]):
        if parameter.requires_grad:  # a step checks all that have a gradient
            check_kernel_parameter(parameter, parameter_name(group, index, number), home)


def check_float32_moments(group: dict[str, Any]) -> None:
    """Refuse 8-bit moments.

    Raises:
        ValueError: With the remedy.
    """
    check_exclusions({"kernels": "triton", "state_dtype": group.get("state_dtype")})


def check_kernel_device(device: torch.device, name: str) -> None:
    """Refuse a device that does not run the kernels.

    Args:
        device: Device of a parameter.
        name: Name of the parameter, for the message.

    Raises:
        ValueError: With the remedy.
    """
    from molf.core.execute.triton.kernels import is_interpreted

    if is_interpreted() and device.type != "cpu":
        raise ValueError(
            f"kernels='triton' runs on the CPU under Triton's interpreter, and {name} is on "
            f"{device}. Unset TRITON_INTERPRET."
        )
    if not is_interpreted() and device.type != "cuda":
        raise ValueError(
            f"kernels='triton' needs CUDA, and {name} is on {device}. Move the model to the GPU "
            "before the optimizer is built, or leave kernels out."
        )


def check_kernel_parameter(parameter: Tensor, name: str, home: torch.device) -> None:
    """Refuse a parameter whose dtype, device or layout the kernels do not support.

    Raises:
        ValueError: With the remedy.
    """
    if parameter.dtype not in _DTYPES:
        raise ValueError(
            f"kernels='triton' is for float32 and bfloat16 weights, and {name} is "
            f"{parameter.dtype}. Load the model in one of them, or leave kernels out."
        )
    if parameter.is_neg():
        raise ValueError(
            f"kernels='triton' reads memory as it is, and {name} is a negative view. Give "
            "parameter.resolve_neg(), or leave kernels out."
        )
    check_kernel_device(parameter.device, name)
    if parameter.device != home:
        raise ValueError(
            f"kernels='triton' needs one device, and {name} is on {parameter.device} while others "
            f"are on {home}. Leave kernels out."
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"kernels='triton' needs contiguous weights, and {name} of shape "
            f"{tuple(parameter.shape)} has strides {parameter.stride()}. Make it contiguous, or "
            "leave kernels out."
        )
