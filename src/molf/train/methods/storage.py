"""How the methods that train dense weights keep weights, gradients and optimizer state."""

from __future__ import annotations

from typing import Any

from molf.train.resolved import ResolvedSettings


def storage_options(settings: ResolvedSettings) -> dict[str, Any]:
    """The keywords of `MoLFAdamW` and `AdamW` for precision and memory."""
    return {
        "weight_rounding": settings.weight_rounding,
        "state_dtype": settings.state_dtype,
        "grad_accumulation_dtype": settings.grad_accumulation_dtype,
        "optimizer_in_backward": settings.optimizer_in_backward,
    }


def is_plain(settings: ResolvedSettings) -> bool:
    """Whether nothing beyond float32 weights and state is wanted."""
    return (
        settings.dtype == "float32"
        and settings.state_dtype == "float32"
        and not settings.optimizer_in_backward
    )
