"""The option `fsdp`: the number of processes that share one model, and its limits."""

from __future__ import annotations

import os
import re
from typing import Any

from molf.errors import InputError

ALL = "all"

_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


def check_sharded(settings: Any) -> None:
    """Check the option and the options beside it.

    Args:
        settings: `TrainSettings`, whose file imports this one.

    Raises:
        InputError: The value is not allowed, or not with a quantised base.
    """
    given = settings.fsdp
    if given is None:
        if settings.fsdp_cpu_offload:
            raise InputError(
                "Invalid fsdp_cpu_offload without fsdp: it moves the shards of a model. Give "
                "--fsdp, or leave it out."
            )
        return
    if given != ALL and not _is_number(given):
        raise InputError(
            f"Invalid fsdp={given}. Must be a number of processes of at least 2, or {ALL}."
        )
    if settings.quantised is not None:
        raise not_quantised(given, settings.quantised)


def _is_number(given: int | str) -> bool:
    return not isinstance(given, bool) and bool(_NUMBER.fullmatch(str(given))) and int(given) > 1


def not_quantised(given: int | str, base: str) -> InputError:
    """Return the error for a quantised base."""
    return InputError(
        f"Invalid fsdp={given} with {base}: the packed weights of a quantised base cannot be cut "
        "into rows. Leave one of the two out."
    )


def shards(given: int | str | None, processes: int) -> int:
    """Return the number of processes that share one model; 1 if each has a whole one.

    Args:
        given: The option.
        processes: Number of processes.

    Raises:
        InputError: The number of processes is no multiple of it.
    """
    if given is None:
        return 1
    if processes == 1:
        raise InputError(
            f"Invalid fsdp={given} with one process. Start several (torchrun --nproc_per_node N "
            "-m molf train ...), or leave fsdp out."
        )
    count = processes if given == ALL else int(given)
    if processes % count:
        raise InputError(
            f"Invalid fsdp={given} with {processes} processes: each replica of the model has "
            f"{given}. Must divide {processes}, or be {ALL}."
        )
    return count


def check_offload(device: str) -> None:
    """Check that shards can be kept away from the device of a training.

    Args:
        device: Its kind.

    Raises:
        InputError: It is no CUDA GPU.
    """
    if device != "cuda":
        raise InputError(
            f"Invalid fsdp_cpu_offload on {device}: it keeps shards in host memory for a CUDA GPU. "
            "Leave it out."
        )


def check_launcher() -> None:
    """Check that the launcher was not asked to divide or to compile the model in its own way.

    Raises:
        InputError: It was, by `accelerate launch` or its configuration.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        variable = f"ACCELERATE_USE_{name}"
        if os.environ.get(variable, "").lower() in ("1", "true", "yes"):
            raise InputError(
                f"Invalid {variable}={os.environ[variable]} (accelerate launch --use_"
                f"{name.lower()}, or its configuration): molf train divides the model itself. "
                "Launch with --multi_gpu alone, and give --fsdp to molf train."
            )
    if (backend := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() not in ("", "no"):
        raise InputError(
            f"Invalid ACCELERATE_DYNAMO_BACKEND={backend} (accelerate launch --dynamo_backend, or "
            "its configuration): give --training_args.torch_compile_backend to molf train."
        )


def fitting(given: int | str | None, processes: int) -> int | str | None:
    """Return the option of a run for another number of processes, as near as possible."""
    if given is None or processes == 1:
        return None
    return given if given == ALL or processes % int(given) == 0 else ALL
