"""Options that a quantised base excludes."""

from __future__ import annotations

from typing import Any

from molf.errors import InputError
from molf.job.settings.defaults import QUANTISABLE, ROUTED

_REASONS = {
    "fft": "it trains the base weights, which quantised ones cannot be",
    "molf": "its full expert trains the base weights, which quantised ones cannot be",
    "dora": "its magnitudes are the norms of weights, and it cannot be merged into quantised ones",
    "pissa": "it decomposes the base weights, which must be real numbers",
    "adalora": "it cannot be merged into quantised weights",
}


def check_beside_quantised(settings: Any, base: str, otherwise: str) -> None:
    """Reject options that exclude a quantised base.

    Args:
        settings: `TrainSettings`, whose file imports this one.
        base: The option or model that makes the base a quantised one, for the message.
        otherwise: How to get another base, for the message.

    Raises:
        InputError: The method, or an option, does not go with it.
    """
    if settings.method not in QUANTISABLE:
        raise InputError(
            f"Invalid {base} with method={settings.method}: {_REASONS[settings.method]}. Use "
            f"--method {', '.join(QUANTISABLE[:-1])} or {QUANTISABLE[-1]}, or {otherwise}."
        )
    if settings.use_dora and settings.method == "hybrid":
        raise InputError(
            f"Invalid use_dora with {base}: magnitudes are norms of weights, and cannot be "
            f"merged into quantised ones. Leave use_dora out, or {otherwise}."
        )
    if settings.dtype != "float32" and settings.method != "hybrid":
        raise InputError(
            f"Invalid dtype={settings.dtype} with {base}: weights that are not quantised stay "
            f"float32. Leave dtype out, or {otherwise}."
        )
    if settings.method in ROUTED and settings.freeze_rest is False:
        raise InputError(
            f"Invalid freeze_rest=False with {base}: only an adapter is trained on a quantised "
            f"base. Leave freeze_rest out, or {otherwise}."
        )
