"""The ways to choose an assignment from decisions. Imports no torch."""

from __future__ import annotations

from molf.errors import InputError
from molf.inputs import check_choice

CHOICES = ("wins", "score")
"""By the wins of each layer, or by the sign of its mean margin."""


def check_chosen(by: str, share: float | None) -> None:
    """Check the two options.

    Raises:
        InputError: One is not allowed, or they exclude each other.
    """
    check_choice("by", by, CHOICES)
    if share is not None and not 0 < share < 1:
        raise InputError(f"Invalid share={share:g}. Must be above 0 and below 1.")
    if share is not None and by != "wins":
        raise InputError(
            f"Invalid share={share:g} with by={by}: a share goes by the score already. Leave one "
            "of the two out."
        )
