"""Check the option that saves the low halves of float32 weights."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError


def check_low_halves(settings: Any) -> None:
    """Reject low halves for other types than bfloat16, or of weights without them.

    Raises:
        InputError: The options exclude each other.
    """
    if not settings.keep_low_halves:
        return
    if settings.save_dtype not in (None, "bfloat16"):
        raise InputError(
            f"Invalid keep_low_halves with save_dtype={settings.save_dtype}: only bfloat16 is the "
            "upper half of float32. Leave one of the two out."
        )
    if settings.weight_rounding in ("stochastic", "nearest"):
        raise InputError(
            f"Invalid keep_low_halves with weight_rounding={settings.weight_rounding}: rounded "
            "weights have no low halves. Leave one of the two out."
        )
