"""Shares and comparisons as Markdown."""

from __future__ import annotations

from molf.measure.estimate_texts import signed
from molf.measure.estimates import Estimate
from molf.study.report.second_phase import Comparison

UNMATCHED = "not share-matched"


def share_text(value: float | None) -> str:
    """Return a share in percent; empty for None."""
    return "" if value is None else f"{value:.1%}"


def compared(found: Comparison | None) -> str:
    """Return a difference; bold if the interval excludes 0, with its seeds if some are lacking."""
    if found is None:
        return "missing"
    text = signed(found.estimate)
    if not found.is_complete:
        return f"{text} (incomplete: {found.seeds} of {found.planned} seeds)"
    return f"**{text}**" if found.differs else text


def bold_if(found: Estimate, *, is_complete: bool) -> str:
    """Return a difference; bold if it is complete and its interval excludes 0."""
    return f"**{signed(found)}**" if is_complete and found.differs else signed(found)


def better_seeds(found: Comparison | None) -> str:
    """Return in how many of the common seeds a method was better."""
    return "" if found is None else f"{found.better} of {found.seeds}"


def shares_compared(found: Comparison) -> str:
    """Return the shares of full updates of both, marked if these differ too much."""
    text = f"{share_text(found.full_share)} / {share_text(found.other_share)}"
    return text if found.is_matched else f"{text}, {UNMATCHED}"
