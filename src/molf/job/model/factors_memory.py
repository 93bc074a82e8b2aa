"""Check that the requested LoRA factors fit into memory, before any is allocated."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from molf.amounts import binary_size
from molf.errors import InputError
from molf.inputs import memory_bytes
from molf.job.methods.base import find_adapted_layers
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.sharding import shards
from molf.ranks import launched_count

_NUMBER = 12  # bytes of a float32 and its two moments, for all types of weights and states


def check_factors(skeleton: Any, settings: ResolvedSettings, device: torch.device) -> None:
    """Reject LoRA factors that exceed the device's total memory together with their moments.

    Args:
        skeleton: The model without weights.
        settings: The settings.
        device: The device of the training.

    Raises:
        InputError: The factors are too large; the message gives the bytes.
    """
    config = settings.method_config
    if config is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given later by the method's own check
        layers = find_adapted_layers(skeleton, settings)
    numbers = sum(layer.lora_parameters(rank) for layer in layers for rank in config.ranks)
    needed = numbers * _NUMBER
    if device.type == "cuda":  # each process has one
        needed //= shards(settings.fsdp, launched_count())
    if settings.fsdp_cpu_offload:
        device = torch.device("cpu")
    there = _memory_of(device)
    # The total, not the free memory: other processes may end before the training starts.
    if there is not None and needed > there:
        ranks = ",".join(map(str, config.ranks))
        raise InputError(
            f"Invalid ranks={ranks}: LoRA factors in {len(layers)} layers are {numbers:,} numbers "
            f"and take {binary_size(needed)} with their moments, and {device.type} has "
            f"{binary_size(there)}. Give smaller --ranks."
        )


def _memory_of(device: torch.device) -> int | None:
    """Return the total memory of a device in bytes, or None if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()
