"""Checks of options that do not support several processes (DDP)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from molf.core.accumulation import is_low


def check_processes(
    parameters: Iterable[Tensor],
    *,
    optimizer_in_backward: bool,
    grad_accumulation_dtype: str | None,
) -> None:
    """Refuse options that do not support several processes.

    Raises:
        ValueError: With what to change.
    """
    # Every step calls this: the process group may be created after the optimizer.
    count = _world_size()
    if count < 2:
        return
    if optimizer_in_backward:
        raise ValueError(
            f"optimizer_in_backward=True with {count} processes is not possible: a layer would "
            "move before its gradients are summed over them. Leave it out."
        )
    if grad_accumulation_dtype is not None and any(map(is_low, parameters)):
        raise ValueError(
            f"grad_accumulation_dtype={grad_accumulation_dtype!r} with {count} processes is not "
            "possible: DDP keeps gradients in buckets of the parameter's dtype. Leave it out, or "
            "load the model in float32."
        )


def _world_size() -> int:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()
