"""Describe the saved share of a training's update in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show_saved(record: Mapping[str, Any] | None) -> str | None:
    """Return a run's `saved` record as a sentence; None without measurements."""
    if not record or "moved_share" not in record:
        return None
    how = str(record["dtype"])
    if record["moved_share"] and not record["update_error"]:
        return f"{how}: the whole update ({record['moved_share']:.1%} of all numbers moved)"
    return (
        f"{how}, rounding {record['rounding']}: {record['update_kept']:.1%} of the update's length "
        f"is kept, with an error of {record['update_error']:.0%} of it; "
        f"{record['moved_share']:.1%} of all numbers moved, {record['kept_share']:.1%} differ from "
        "the base after saving"
    )
