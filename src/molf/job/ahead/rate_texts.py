"""Lines on a sweep: its suggestion with the evidence."""

from __future__ import annotations

from molf.job.ahead.evidence import SweptRate

_GRID = (1, 3, 10)  # times the suggestion


def evidence_lines(sweep: SweptRate) -> list[str]:
    """Return the suggestion and its evidence, a line each."""
    found = sweep.evidence
    if found.suggestion is None:
        lines = ["no suggestion"]
    else:
        lines = [f"suggestion  --{sweep.option} {found.suggestion:g}"]
        grid = ", ".join(f"{factor * found.suggestion:.2g}" for factor in _GRID)
        lines.append(
            f"grid        {grid}: best rates were 1 to 6 times the suggestion (docs/rates.md)"
        )
        lines.append(
            f"fell        from {found.fell_from:.2g} to {found.lowest_at:.2g}: loss "
            f"{found.start:.3g} to {found.lowest:.3g}, {found.fall:.0f} standard errors"
        )
        lines.append(
            f"steepest    at {found.steepest:.2g}, {found.steepest_clear:.0f} standard errors of "
            "the slope"
        )
    end = f"highest rate {sweep.rates[-1]:.2g}"
    lines.append(
        f"diverged    not up to the {end}"
        if found.diverged_at is None
        else f"diverged    at {found.diverged_at:.2g}"
    )
    lines.append(f"noise       {found.noise:.2g} per step at the start (standard deviation)")
    return lines
