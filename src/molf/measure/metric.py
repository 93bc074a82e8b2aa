"""Metrics with 95% intervals, and the result of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

RESAMPLES = 1000
_Z = 1.959963984540054  # the standard normal's 97.5% quantile
_RESAMPLES_AT_ONCE = 50  # bounds the memory of a bootstrap: 50 integers per observation


@dataclass(frozen=True)
class Metric:
    """A measured value with its 95% interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval; NaN where it is unknown.
        high: Upper end of the interval; NaN where it is unknown.
        count: Number of observations.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: Name to metric. A metric without observations is absent and explained in `notes`.
        predictions: One entry per evaluated record of the data file, JSON values only. Where a
            record has no answer, `prediction` is None and `left_out` is the reason.
        notes: Further facts about the evaluation: counts of ties, of records left out, ...
        tables: Break-downs of metrics, each a name to {group: {metric name: metric}}.
    """

    metrics: dict[str, Metric]
    predictions: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, dict[str, dict[str, Metric]]] = field(default_factory=dict)


def wilson(successes: int, n: int) -> Metric:
    """Compute the share of successes with its score interval (Wilson 1927, JASA 22).

    Unlike the normal approximation, the interval stays inside [0, 1] and has a width at 0 and n.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(
            f"Invalid successes={successes}, n={n}. Must be 0 <= successes <= n, n > 0."
        )
    share = successes / n
    shrink = 1 / (1 + _Z**2 / n)
    centre = shrink * (share + _Z**2 / (2 * n))
    half = shrink * _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # At 0 and n successes an end is exactly 0 or 1: rounding could exclude the value itself.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return Metric(share, low, high, n)


def bootstrap(
    columns: FloatArray, statistic: Callable[[FloatArray], FloatArray], seed: int = 0
) -> Metric:
    """Compute a statistic of column sums with its percentile bootstrap interval (Efron 1979).

    Args:
        columns: One row per observation, the unit that is resampled: [n, k].
        statistic: From column sums [m, k] to values [m]; NaN where a resample leaves it undefined.
        seed: Seed of the resampling.

    Returns:
        The statistic of all rows. The interval uses the resamples in which the statistic is
        defined; for a single row its ends are NaN.
    """
    n = len(columns)
    if n < 1:
        raise ValueError("A bootstrap needs at least one observation.")
    value = float(statistic(columns.sum(axis=0, keepdims=True))[0])
    if n == 1:
        return Metric(value, float("nan"), float("nan"), n)
    rng = np.random.default_rng(seed)
    values = []
    for start in range(0, RESAMPLES, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, RESAMPLES - start)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)  # times each row is drawn
        values.append(statistic(drawn @ columns))
    low, high = np.nanpercentile(np.concatenate(values), [2.5, 97.5])
    return Metric(value, float(low), float(high), n)


def ratio_of_sums(sums: FloatArray) -> FloatArray:
    """Divide column 0 by column 1, [m, 2] to [m]; NaN where column 1 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def bootstrap_mean(
    values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Metric:
    """Compute the (weighted) mean with its percentile bootstrap interval.

    Args:
        values: One value per observation.
        weights: One weight per observation, such as its number of tokens; equal when None.
        seed: Seed of the resampling.
    """
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    return bootstrap(np.stack([value * weight, weight], axis=1), ratio_of_sums, seed)
