"""Choose the attention of a loaded model (`--attn_implementation`)."""

from __future__ import annotations

from typing import Any

import torch

from molf.errors import InputError, reason_of
from molf.job.settings.resolved import ResolvedSettings

_NO_BACKWARD_ON_CPU = ("flex_attention",)


def check_attention(settings: ResolvedSettings, skeleton: Any, device: torch.device) -> None:
    """Check that the attention is there for the model and the device, before the weights are read.

    Args:
        settings: The settings.
        skeleton: The model without weights, which takes the attention.
        device: The device of the training.

    Raises:
        InputError: It is not.
    """
    name = settings.attn_implementation
    if name in _NO_BACKWARD_ON_CPU and device.type == "cpu":
        raise InputError(
            f"Invalid attn_implementation={name} on {device}: torch has no backward pass of it on "
            "a CPU. Give eager or sdpa, or leave it out."
        )
    if str(name).startswith("flash") and settings.dtype == "float32":
        # Evaluations run without autocast, in the type of the weights.
        raise InputError(
            f"Invalid attn_implementation={name} with dtype=float32: it computes in 16 bits. Give "
            "--dtype bfloat16."
        )
    set_attention(skeleton, name, settings.model)


def set_attention(model: Any, name: str | None, path: str) -> None:
    """Set the attention of a model and of its parts.

    Args:
        model: A model of transformers.
        name: Name of the attention in transformers; None leaves the model as it is.
        path: Directory or Hub id of the model, for messages.

    Raises:
        InputError: The model has no such attention, or its library is not installed.
    """
    if name is None:
        return
    invalid = f"Invalid attn_implementation={name} with model {path}"
    # transformers would only log that it leaves such a model as it is.
    if name != model.config._attn_implementation and not model._can_set_attn_implementation():
        raise InputError(
            f"{invalid}: the attention of {type(model).__name__} cannot be chosen. Leave it out."
        )
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise InputError(f"{invalid}: {reason_of(error)}") from error
