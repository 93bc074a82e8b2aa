"""Means over seeds and paired differences with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from molf.study.questions import HARMONIC

Array = npt.NDArray[np.float64]
SeedScores = Mapping[int, Mapping[str, tuple[float, float]]]
"""By seed and question: successes and attempts."""

RESAMPLES = 2000
# 97.5% quantiles of Student's t by degrees of freedom; above, that of 30 is a little wide.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: The value.
        low: Lower end; NaN where it is unknown.
        high: Upper end; NaN where it is unknown.
        units: What was resampled: `questions and seeds`, or `seeds`.
    """

    value: float
    low: float
    high: float
    units: str

    @property
    def differs(self) -> bool:
        """Whether the interval of a difference excludes 0."""
        return self.low > 0 or self.high < 0


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean with Student's interval over seeds; its ends are NaN for one seed."""
    found = np.asarray(values, dtype=np.float64)
    mean, count = float(found.mean()), len(found)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, "seeds")
    quantile = _T[min(count - 1, len(_T)) - 1]
    half = quantile * float(found.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, "seeds")


def mean_of_questions(metric: str, scores: Mapping[str, SeedScores]) -> Estimate | None:
    """Return a metric over all questions and seeds with its interval; None without scores."""
    return _resampled(metric, [scores], lambda values: values[0])


def difference_of_questions(
    metric: str, scores: Mapping[str, SeedScores], others: Mapping[str, SeedScores]
) -> Estimate | None:
    """Return the paired difference of a metric between two methods; None without scores.

    Seeds and questions that only one of them has are left out.
    """
    return _resampled(metric, [scores, others], lambda values: values[0] - values[1])


def _resampled(
    metric: str,
    methods: Sequence[Mapping[str, SeedScores]],
    combine: Callable[[list[Array]], Array],
) -> Estimate | None:
    """Resample seeds and questions independently, the same ones for all methods.

    A question has similar outcomes with all seeds, so that pairs of both are not independent. The
    pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1) weights each pair by the draws
    of its seed times those of its question; it is conservative.
    """
    parts = HARMONIC.get(metric, (metric,))
    if any(not method.get(part) for method in methods for part in parts):
        return None
    seeds = sorted(set.intersection(*(set(m[part]) for m in methods for part in parts)))
    if not seeds:
        return None
    # Not all questions have all parts: their attempts there are 0.
    names = sorted(
        {q for seed in seeds for q in methods[0][parts[0]][seed]}
        & {q for seed in seeds for q in methods[-1][parts[0]][seed]}
    )
    if not names:
        return None
    tables = [
        [_tables(method[part], methods, part, seeds, names) for part in parts] for method in methods
    ]
    rng = np.random.default_rng(0)
    ones = np.ones((1, len(seeds))), np.ones((1, len(names)))
    drawn = (
        rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), RESAMPLES).astype(float),
        rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES).astype(float),
    )
    value, resamples = (
        combine([_metric(method, *weights) for method in tables]) for weights in (ones, drawn)
    )
    if len(names) == 1 or np.all(np.isnan(resamples)):
        return Estimate(float(value[0]), math.nan, math.nan, "questions and seeds")
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return Estimate(float(value[0]), float(low), float(high), "questions and seeds")


def _tables(
    scores: SeedScores,
    methods: Sequence[Mapping[str, SeedScores]],
    part: str,
    seeds: Sequence[int],
    names: Sequence[str],
) -> tuple[Array, Array]:
    """Return successes and attempts [seeds, questions]; 0 for pairs that a method lacks."""
    shape = (len(seeds), len(names))
    right, asked = np.zeros(shape), np.zeros(shape)
    for row, seed in enumerate(seeds):
        for column, name in enumerate(names):
            if all(name in method[part][seed] for method in methods):
                right[row, column], asked[row, column] = scores[seed][name]
    return right, asked


def _metric(tables: Sequence[tuple[Array, Array]], of_seeds: Array, of_names: Array) -> Array:
    """Return the metric for each weighting, [resamples]; the harmonic mean of several parts."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [
            ((of_seeds @ right) * of_names).sum(axis=1)
            / ((of_seeds @ asked) * of_names).sum(axis=1)
            for right, asked in tables
        ]
        if len(shares) == 1:
            return shares[0]
        harmonic: Array = len(shares) / np.sum([1 / share for share in shares], axis=0)
    return harmonic


@dataclass(frozen=True)
class Sensitivity:
    """A metric over the tried rates.

    Attributes:
        area: Mean over the logarithm of the rate, by the trapezoidal rule.
        worst: The worst value.
        decades: Width of the range of rates, in powers of ten.
    """

    area: float
    worst: float
    decades: float


def sensitivity(values: Mapping[float, float], *, minimize: bool) -> Sensitivity | None:
    """Return how much a metric depends on the rate; None for fewer than two rates.

    Args:
        values: The metric by rate.
        minimize: Whether a lower value is better.
    """
    if len(values) < 2:
        return None
    rates = np.array(sorted(values))
    metric = np.array([values[rate] for rate in rates])
    logs = np.log10(rates)
    width = float(logs[-1] - logs[0])
    area = float((np.diff(logs) * (metric[1:] + metric[:-1]) / 2).sum() / width)
    worst = float(metric.max() if minimize else metric.min())
    return Sensitivity(area, worst, width)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of points that no other one beats, for (lower is better, higher is better).

    A point is beaten if another one is at least as good in both and better in one.
    """
    return [
        name
        for name, (harm, quality) in points.items()
        if not any(
            other_harm <= harm and other >= quality and (other_harm, other) != (harm, quality)
            for other_harm, other in points.values()
        )
    ]
