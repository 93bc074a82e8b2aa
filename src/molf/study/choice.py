"""The choice of a method's rates from the values of the first phase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

HARMS = ("forgetting_loss", "kl_neutral", "kl_task")
"""Measures of harm. All are lowest without training, so rates are not chosen by them."""


@dataclass(frozen=True)
class ChosenPoint:
    """The point that the first phase prefers.

    Attributes:
        index: Number of the point.
        value: Mean of the metric over the seeds of the phase.
    """

    index: int
    value: float


def point_means(values: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Return the mean over seeds by point; NaN where a seed failed.

    Args:
        values: By point, one value per seed; NaN for a trial that failed or was pruned.
    """
    return {index: fmean(found) for index, found in values.items() if found}


def choose_point(values: Mapping[int, Sequence[float]], *, minimize: bool) -> ChosenPoint | None:
    """Return the point with the best mean over seeds; None if every point has a failed seed.

    Among equal means the point of the lowest number is chosen.

    Args:
        values: By point, one value per seed; NaN for a trial that failed or was pruned.
        minimize: Whether a lower value is better.
    """
    means = {index: mean for index, mean in point_means(values).items() if not math.isnan(mean)}
    if not means:
        return None
    sign = 1 if minimize else -1
    best = min(means, key=lambda index: (sign * means[index], index))
    return ChosenPoint(best, means[best])
