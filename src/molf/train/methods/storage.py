"""How the methods that train dense weights keep weights and optimizer state."""

from __future__ import annotations

from typing import Any

from molf.train.resolved import ResolvedSettings


def storage_options(settings: ResolvedSettings) -> dict[str, Any]:
    """The keywords of `MoLFAdamW` and `AdamW` for the precision of weights and state."""
    return {
        "weight_rounding": settings.weight_rounding,
        "state_dtype": settings.state_dtype,
    }
