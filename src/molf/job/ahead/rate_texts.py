"""Sentences on a sweep: its suggestion with the evidence, and the doubts about it."""

from __future__ import annotations

import math

from molf.job.ahead.evidence import SweptRate

_GRID = (1, 3, 10)  # times the suggestion
_APART = 3.0  # factor between the middle of the fall and its steepest place
_FEW_STEPS = 10  # per decade
_NOISY = 0.25  # of the fall
_SELDOM = 0.5  # of the updates


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


def doubts(sweep: SweptRate) -> list[str]:
    """Return sentences on evidence that is thin; empty for none."""
    found = sweep.evidence
    lines = []
    if not found.has_fallen:
        lines.append(
            f"The loss did not fall clearly above its noise: {found.start:.3g} to "
            f"{found.lowest:.3g}, {max(found.fall, 0):.1f} standard errors. Give more --max_steps, "
            "larger batches, or a higher --to."
        )
    if found.diverged_at is None:
        lines.append(
            f"The loss did not diverge up to {sweep.rates[-1]:.2g}, so the highest usable rate was "
            "not seen. Give a higher --to."
        )
    if found.falls_at_once:
        lines.append(
            "The loss fell from the lowest rate on, so no rate was seen at which nothing is "
            "learned. Give a lower --from."
        )
    per_decade = _steps_per_decade(sweep)
    if per_decade < _FEW_STEPS:
        lines.append(
            f"{per_decade:.0f} steps per decade are few. Give more --max_steps, or a smaller range."
        )
    if found.half_at is not None and found.steepest is not None:
        apart = max(found.half_at / found.steepest, found.steepest / found.half_at)
        if apart > _APART:
            lines.append(
                f"The steepest fall ({found.steepest:.2g}) and the middle of the fall "
                f"({found.half_at:.2g}) are a factor of {apart:.1f} apart: the fall has no clear "
                "place."
            )
    if found.has_fallen and found.noise > _NOISY * (found.start - found.lowest):
        lines.append(
            f"The noise of a step is {found.noise / (found.start - found.lowest):.0%} of the fall. "
            "Larger batches lower it."
        )
    if sweep.passes > 1:
        lines.append(
            f"Each example was seen {sweep.passes:.1f} times: the loss fell by repetition as well."
        )
    if (won := sweep.won_at_suggestion) is not None and won < _SELDOM:
        lines.append(
            f"The experts with this rate won {won:.1%} of the updates near the suggestion; the "
            "others, which won the rest, had a rate of 0."
        )
    return lines


def _steps_per_decade(sweep: SweptRate) -> float:
    decades = math.log10(sweep.rates[-1] / sweep.rates[0])
    return (len(sweep.rates) - 1) / max(decades, 1e-9)
