"""Checks of options that do not support several processes (DDP)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from molf.core.options import check_exclusions
from molf.core.storage.accumulation import is_low


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
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    count = torch.distributed.get_world_size()
    settings: dict[str, Any] = {"processes": count, "optimizer_in_backward": optimizer_in_backward}
    if any(map(is_low, parameters)):
        settings["grad_accumulation_dtype"] = grad_accumulation_dtype
    check_exclusions(settings)
