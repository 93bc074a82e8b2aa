"""The evidence of a sweep: where the loss fell, fell fastest and diverged, and how noisy it is.

Losses are smoothed by a local line over the logarithm of the rate, with Gaussian weights. The slope
of that line is the fall of the loss per decade of the rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_WIDTH = 0.15  # decades: standard deviation of the weights; at least `_LEAST_STEPS` steps
_LEAST_STEPS = 2.0
_FIRST = 0.5  # decades in which the loss before any effect of the rate is measured
_CLEAR = 4.0  # standard errors by which the loss must fall: there are dozens of places to look at
_BEGUN = 0.1  # share of the fall after which it has begun


@dataclass(frozen=True)
class Evidence:
    """The evidence of a sweep. Rates are None where nothing was seen.

    Attributes:
        smoothed: The loss by the local line at each step: [steps].
        slopes: Its change per decade of the rate: [steps].
        start: The loss before the rate has an effect.
        noise: Standard deviation of the loss of a step around the smoothed one.
        lowest: The lowest smoothed loss.
        fall: By how much the loss fell, in standard errors of that difference.
        fell_from: The rate at which the fall had begun.
        lowest_at: The rate with the lowest smoothed loss.
        steepest: The rate at which the loss fell fastest.
        diverged_at: The rate at which the sweep ended by its loss.
    """

    smoothed: Floats
    slopes: Floats
    start: float
    noise: float
    lowest: float
    fall: float
    fell_from: float | None
    lowest_at: float | None
    steepest: float | None
    diverged_at: float | None

    @property
    def has_fallen(self) -> bool:
        """Whether the loss fell clearly above its noise."""
        return self.steepest is not None

    @property
    def suggestion(self) -> float | None:
        """The suggested rate, with two digits: that of the steepest fall; None without one."""
        return None if self.steepest is None else float(f"{self.steepest:.2g}")

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
        evidence: What the curve shows.
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
        steepest = self.evidence.steepest
        if steepest is None or not len(self.won):
            return None
        near = np.abs(np.log10(self.rates[: len(self.won)] / steepest)) < 0.15
        return float(self.won[near].mean())


@dataclass(frozen=True)
class RangeTest:
    """The result of a range test.

    Attributes:
        directory: The directory, with `rates.json`, `rates.csv` and `rates.png`.
        method: The method.
        sweeps: One per rate.
        seconds: Time of the steps.
    """

    directory: Path
    method: str
    sweeps: tuple[SweptRate, ...]
    seconds: float


def evidence_of(rates: Floats, losses: Floats, *, diverged: bool) -> Evidence:
    """Return the evidence of a sweep.

    Args:
        rates: The rate of each step, growing by a constant factor: [steps].
        losses: The loss of each step, before its update; the last may not be finite: [steps].
        diverged: Whether the loss of the last step ended the sweep.
    """
    end = float(rates[-1]) if diverged else None
    finite = np.isfinite(losses)
    places, known = np.log10(rates[finite]), losses[finite]
    smoothed, slopes, errors, noise = _local_lines(places, known)
    first = places <= places[0] + _FIRST
    start, start_error = float(known[first].mean()), noise / float(np.sqrt(first.sum()))
    place = int(np.argmin(smoothed))
    lowest = float(smoothed[place])
    error = float(np.hypot(start_error, errors[place]))
    fall = (start - lowest) / max(error, 1e-12)
    whole, whole_slopes = (np.full(len(losses), np.nan) for _ in range(2))
    whole[finite], whole_slopes[finite] = smoothed, slopes
    fell_from = lowest_at = steepest = None
    if fall > _CLEAR and place > 0:
        above = np.flatnonzero(smoothed[:place] > start - _BEGUN * (start - lowest))
        begun = int(above[-1]) if len(above) else 0
        fell_from = float(10 ** places[begun])
        lowest_at = float(10 ** places[place])
        steepest = float(10 ** places[begun + int(np.argmin(slopes[begun : place + 1]))])
    return Evidence(
        smoothed=whole,
        slopes=whole_slopes,
        start=start,
        noise=noise,
        lowest=lowest,
        fall=fall,
        fell_from=fell_from,
        lowest_at=lowest_at,
        steepest=steepest,
        diverged_at=end,
    )


def _local_lines(places: Floats, losses: Floats) -> tuple[Floats, Floats, Floats, float]:
    """Return values, slopes and standard errors of local lines, and the noise around them."""
    step = float(np.median(np.diff(places)))
    width = max(_WIDTH, _LEAST_STEPS * step)
    values, slopes, errors = (np.empty(len(places)) for _ in range(3))
    for index, place in enumerate(places):
        weights = np.exp(-0.5 * ((places - place) / width) ** 2)
        slopes[index], values[index] = np.polyfit(places - place, losses, 1, w=np.sqrt(weights))
        errors[index] = np.sqrt((weights**2).sum()) / weights.sum()
    # Differences of neighbours: the curve itself has none of their size, and the median leaves
    # out the last steps, which may rise steeply.
    noise = float(1.4826 * np.median(np.abs(np.diff(losses))) / np.sqrt(2))
    return values, slopes, errors * noise, noise
