"""How much a metric depends on the rate, within one decade around each method's chosen rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

WIDTH = 1.0
"""Decades of the window, half of it below the chosen rate and half above."""

_WHOLE = 0.95  # share of the window that must have been tried


@dataclass(frozen=True)
class Sensitivity:
    """A metric over the rates near the chosen one.

    Methods have different scales of rates (a LoRA's is about ten times that of dense weights), so
    each is measured in a window of its own: one decade, its chosen rate in the middle.

    Attributes:
        area: Mean over the logarithm of the rate in the tried part of the window. Values between
            tried rates are interpolated linearly.
        worst: The worst value there.
        covered: Share of the window between the lowest and the highest tried rate.
    """

    area: float
    worst: float
    covered: float

    @property
    def is_whole(self) -> bool:
        """Whether the window was tried, so that methods can be compared."""
        return self.covered >= _WHOLE


def sensitivity(
    values: Mapping[float, float], center: float, *, minimize: bool
) -> Sensitivity | None:
    """Return how much a metric depends on the rate; None for fewer than two rates.

    Args:
        values: The metric by rate.
        center: The chosen rate, one of these.
        minimize: Whether a lower value is better.
    """
    if len(values) < 2:
        return None
    rates = sorted(values)
    logs = np.log10(rates)
    metric = np.array([values[rate] for rate in rates])
    middle = math.log10(center)
    low = max(middle - WIDTH / 2, float(logs[0]))
    high = min(middle + WIDTH / 2, float(logs[-1]))
    inner = logs[(logs > low) & (logs < high)]
    at = np.concatenate([[low], inner, [high]])
    found = np.interp(at, logs, metric)
    area = float((np.diff(at) * (found[1:] + found[:-1]) / 2).sum() / (high - low))
    worst = float(found.max() if minimize else found.min())
    return Sensitivity(area, worst, (high - low) / WIDTH)
