"""The evidence of a sweep: where the loss fell, fell fastest and diverged, and how noisy it is.

Losses are smoothed by a local line over the logarithm of the rate, with Gaussian weights. The slope
of that line is the change of the loss per decade of the rate. Errors follow from the residuals of
the line, because the noise of a loss becomes smaller as it falls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from molf.amounts import fixed

Floats = npt.NDArray[np.float64]

_WIDTH = 0.25  # decades: standard deviation of the weights; at least `_LEAST_STEPS` steps
_LEAST_STEPS = 2.0
_FIRST = 1.0  # decades in which the loss before any effect of the rate is measured
_MOST_FIRST = 0.25  # of the range
_LEAST_FIRST = 3  # losses, for a standard deviation
_CLEAR = 4.0  # standard errors by which the loss must fall: there are dozens of places to look at
_BEGUN = 0.1  # share of the fall after which it has begun

# Doubts:
_APART = 3.0  # factor between the middle of the fall and its steepest place
_FEW_STEPS = 10  # per decade
_NOISY = 0.25  # of the fall
_SELDOM = 0.5  # of the updates


@dataclass(frozen=True)
class Evidence:
    """The evidence of a sweep. Rates are None where nothing was seen.

    Attributes:
        smoothed: The loss by the local line at each step: [steps].
        slopes: Its change per decade of the rate: [steps].
        start: The loss before the rate has an effect.
        noise: Standard deviation of the loss of a step at the start.
        lowest: The lowest smoothed loss.
        fall: By how much the loss fell, in standard errors of that difference.
        fell_from: The rate at which a tenth of the fall was reached for good.
        half_at: The rate at which half of it was.
        lowest_at: The rate with the lowest smoothed loss.
        steepest: The rate at which the loss fell fastest.
        steepest_clear: Its slope, in standard errors of the slope.
        falls_at_once: Whether the fall began where the loss at the start is measured.
        diverged_at: The rate at which the sweep ended by its loss.
    """

    smoothed: Floats
    slopes: Floats
    start: float
    noise: float
    lowest: float
    fall: float
    fell_from: float | None
    half_at: float | None
    lowest_at: float | None
    steepest: float | None
    steepest_clear: float
    falls_at_once: bool
    diverged_at: float | None

    @property
    def has_fallen(self) -> bool:
        """Whether the loss fell clearly above its noise."""
        return self.half_at is not None

    @property
    def suggestion(self) -> float | None:
        """The suggested rate, with two digits: the middle of the fall; None without one."""
        # Not the steepest place: in a noisy curve that is one of its waves.
        return None if self.half_at is None else float(f"{self.half_at:.2g}")

    def record(self) -> dict[str, Any]:
        """Return everything but the curves as plain values."""
        values = {k: v for k, v in vars(self).items() if k not in ("smoothed", "slopes")}
        return {"suggestion": self.suggestion, **values}


@dataclass(frozen=True)
class SweptRate:
    """One sweep.

    Attributes:
        option: `learning_rate` or `lora_learning_rate`.
        held: The option of the other rate, which was held at 0; None if the method has one rate.
        rates: The rate of each step: [steps].
        losses: The loss of each step: [steps].
        won: The share of layers whose update went to the experts with the rate: [steps]; empty
            without routing.
        evidence: The evidence of the curve.
        passes: Passes over the examples.
    """

    option: str
    held: str | None
    rates: Floats
    losses: Floats
    won: Floats
    evidence: Evidence
    passes: float

    @property
    def won_at_suggestion(self) -> float | None:
        """The share of updates that the experts won at the suggested rate; None without routing."""
        rate = self.evidence.half_at
        if rate is None or not len(self.won):
            return None
        near = np.abs(np.log10(self.rates[: len(self.won)] / rate)) < _WIDTH
        return float(self.won[near].mean())

    @property
    def doubts(self) -> list[str]:
        """Sentences on evidence that is thin; empty for none."""
        found = self.evidence
        lines = []
        if not found.has_fallen:
            lines.append(
                f"The loss did not fall clearly above its noise: {found.start:.3g} to "
                f"{found.lowest:.3g}, {max(found.fall, 0):.1f} standard errors. Give more "
                "--max_steps, larger batches, or a higher --to."
            )
        if found.diverged_at is None:
            lines.append(
                f"The loss did not diverge up to {self.rates[-1]:.2g}, so the highest usable "
                "rate was not seen. Give a higher --to."
            )
        if found.falls_at_once:
            lines.append(
                "The loss fell from the lowest rate on, so no rate was seen at which nothing is "
                "learned. Give a lower --from."
            )
        per_decade = self._steps_per_decade()
        if per_decade < _FEW_STEPS:
            lines.append(
                f"{fixed(per_decade, 0)} steps per decade are few. Give more --max_steps, or a "
                "smaller range."
            )
        if found.half_at is not None and found.steepest is not None:
            apart = max(found.half_at / found.steepest, found.steepest / found.half_at)
            if apart > _APART:
                lines.append(
                    f"The steepest fall ({found.steepest:.2g}) and the middle of the fall "
                    f"({found.half_at:.2g}) are a factor of {apart:.1f} apart: the fall has no "
                    "clear place."
                )
        if found.has_fallen and found.noise > _NOISY * (found.start - found.lowest):
            lines.append(
                f"The noise of a step is {found.noise / (found.start - found.lowest):.0%} of the "
                "fall. Larger batches lower it."
            )
        if self.passes > 1:
            lines.append(
                f"Each example was seen {self.passes:.1f} times: the loss fell by repetition as "
                "well."
            )
        if (won := self.won_at_suggestion) is not None and won < _SELDOM:
            lines.append(
                f"The experts with this rate won {won:.1%} of the updates near the suggestion; the "
                "others, which won the rest, had a rate of 0."
            )
        return lines

    def _steps_per_decade(self) -> float:
        decades = math.log10(self.rates[-1] / self.rates[0])
        return (len(self.rates) - 1) / max(decades, 1e-9)


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test of learning rates.

    Attributes:
        path: The directory, with `rates.json`, `rates.csv` and `rates.png`.
        method: The method.
        sweeps: One per rate of the method, with its curve and evidence.
        seconds: Time of the steps.
    """

    path: Path
    method: str
    sweeps: tuple[SweptRate, ...]
    seconds: float

    @property
    def suggestions(self) -> dict[str, float | None]:
        """The suggested rates by option; None where the loss did not fall clearly."""
        return {sweep.option: sweep.evidence.suggestion for sweep in self.sweeps}


def evidence_of(rates: Floats, losses: Floats, *, diverged: bool) -> Evidence:
    """Return the evidence of a sweep.

    Args:
        rates: The rate of each step, growing by a constant factor: [steps].
        losses: The loss of each step, before its update; the last may not be finite: [steps].
        diverged: Whether the loss of the last step ended the sweep.
    """
    finite = np.isfinite(losses)
    places, known = np.log10(rates[finite]), losses[finite]
    lines = _local_lines(places, known)
    smoothed, slopes = lines.values, lines.slopes
    first = places <= places[0] + min(_FIRST, _MOST_FIRST * (places[-1] - places[0]))
    first[:_LEAST_FIRST] = True
    start, noise = float(known[first].mean()), float(known[first].std(ddof=1))
    lowest_place = int(np.argmin(smoothed))
    lowest = float(smoothed[lowest_place])
    start_error = noise / float(np.sqrt(first.sum()))
    error = float(np.hypot(start_error, lines.value_errors[lowest_place]))
    fall = (start - lowest) / max(error, 1e-12)
    has_fallen = fall > _CLEAR and lowest_place > 0

    def reached(share: float) -> int:
        """Return the last place before the lowest loss with less than a share of the fall."""
        above = smoothed[:lowest_place] > start - share * (start - lowest)
        return int(np.flatnonzero(above)[-1]) if above.any() else 0

    def rate(place: int) -> float | None:
        return float(10 ** places[place]) if has_fallen else None

    begun = reached(_BEGUN)
    steepest = begun + int(np.argmin(slopes[begun : lowest_place + 1]))
    whole, whole_slopes = (np.full(len(losses), np.nan) for _ in range(2))
    whole[finite], whole_slopes[finite] = smoothed, slopes
    return Evidence(
        smoothed=whole,
        slopes=whole_slopes,
        start=start,
        noise=noise,
        lowest=lowest,
        fall=fall,
        fell_from=rate(begun),
        half_at=rate(reached(0.5)),
        lowest_at=rate(lowest_place),
        steepest=rate(steepest),
        steepest_clear=float(-slopes[steepest] / max(lines.slope_errors[steepest], 1e-12)),
        falls_at_once=has_fallen and bool(first[begun]),
        diverged_at=float(rates[-1]) if diverged else None,
    )


class _Lines(NamedTuple):
    """Local lines at each place, with standard errors: [places] each."""

    values: Floats
    slopes: Floats
    value_errors: Floats
    slope_errors: Floats


def _local_lines(places: Floats, losses: Floats) -> _Lines:
    width = max(_WIDTH, _LEAST_STEPS * float(np.median(np.diff(places))))
    lines = _Lines(*(np.empty(len(places)) for _ in range(4)))
    for index, place in enumerate(places):
        x = places - place
        weights = np.exp(-0.5 * (x / width) ** 2)
        slope, value = np.polyfit(x, losses, 1, w=np.sqrt(weights))
        total, squares = weights.sum(), (weights**2).sum()
        freedom = total**2 / squares  # effective number of losses, of which the line takes two
        residuals = losses - (value + slope * x)
        variance = (weights * residuals**2).sum() / total * freedom / max(freedom - 2, 1)
        from_mean = x - (weights * x).sum() / total
        lines.values[index], lines.slopes[index] = value, slope
        lines.value_errors[index] = np.sqrt(variance * squares) / total
        lines.slope_errors[index] = (
            np.sqrt(variance * (weights**2 * from_mean**2).sum()) / (weights * from_mean**2).sum()
        )
    return lines
