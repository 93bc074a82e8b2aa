"""Checks of options and parameters with several processes (DDP, FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from molf.core.options import check_exclusions
from molf.core.storage.accumulation import is_low
from molf.core.storage.sharding import check_layouts, is_sharded


def has_processes() -> bool:
    """Return whether this process is one of a group, possibly the only one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def check_processes(
    groups: Iterable[Mapping[str, Any]],
    name_of: Callable[[Tensor], str],
    *,
    optimizer_in_backward: bool,
    grad_accumulation_dtype: str | None,
    state_offload: bool,
    kernels: str,
) -> None:
    """Refuse options and parameters that do not support several processes.

    Args:
        groups: All parameter groups.
        name_of: Returns the name of one, for messages.
        optimizer_in_backward: An option, as the following ones.
        grad_accumulation_dtype: An option.
        state_offload: An option.
        kernels: An option.

    Raises:
        ValueError: With the remedy.
    """
    # Every step calls this: the process group may be created after the optimizer, and libraries
    # replace parameters by sharded ones.
    if not has_processes():
        return
    parameters = [p for group in groups for p in group["params"] if _takes_part(p, group)]
    layout = check_layouts(parameters, name_of)
    count = torch.distributed.get_world_size()
    settings: dict[str, Any] = {"processes": count, "optimizer_in_backward": optimizer_in_backward}
    if any(map(is_low, parameters)):
        settings["grad_accumulation_dtype"] = grad_accumulation_dtype
    if layout is not None:
        settings |= {"shards": count, "state_offload": state_offload, "kernels": kernels}
    check_exclusions(settings)


def _takes_part(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether the distribution of a parameter matters to a step.

    A whole frozen parameter has no gradient to be summed. In a routed layer it would have to be cut
    as the others are. A frozen base in shards shows that a whole adapter beside it is a mistake.
    """
    is_trained = parameter.requires_grad or parameter.grad is not None
    return is_trained or is_sharded(parameter) or group["layer"] is not None
