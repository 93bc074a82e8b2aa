"""Means over seeds and paired differences with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from molf.measure.questions import HARMONIC

Array = npt.NDArray[np.float64]
SeedScores = Mapping[int, Mapping[str, tuple[float, float]]]
"""By seed and question: successes and attempts."""

_BOUNDS = (0.0, 1.0)  # of a share
_SEEDS, _QUESTIONS = 0, 1  # axes of a table of scores
# 97.5% quantiles: of the normal distribution, and of Student's t by degrees of freedom.
_Z = NormalDist().inv_cdf(0.975)
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
        units: What may differ in a repetition: `questions and seeds`, `seeds` or `questions`.
    """

    value: float
    low: float
    high: float
    units: str

    @property
    def differs(self) -> bool:
        """Whether the interval of a difference excludes 0."""
        return self.low > 0 or self.high < 0


def by_metric(
    scores: Mapping[int, Mapping[str, Mapping[str, tuple[float, float]]]],
) -> dict[str, SeedScores]:
    """Return scores by metric, of the metrics that all seeds have.

    Args:
        scores: By seed and metric, the scores of questions.
    """
    names = [set(found) for found in scores.values()]
    common = set.intersection(*names) if names else set()
    return {name: {seed: found[name] for seed, found in scores.items()} for name in sorted(common)}


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean with Student's interval over seeds; its ends are NaN for one seed."""
    found = np.asarray(values, dtype=np.float64)
    mean, count = float(found.mean()), len(found)
    if count < 2:
        return Estimate(mean, math.nan, math.nan, "seeds")
    half = _quantile(count) * float(found.std(ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, "seeds")


def minus_best_over_seeds(
    values: Mapping[int, float], others: Sequence[Mapping[int, float]], *, minimize: bool
) -> Estimate | None:
    """Return a mean over seeds minus the best mean of others, over their common seeds.

    The best one is chosen again without each seed (jackknife). With one other this is the paired
    difference with Student's interval.

    Args:
        values: Values by seed.
        others: Those of the others, at least one.
        minimize: Whether a lower value is better.

    Returns:
        The difference; its ends are NaN for one seed. None without a common seed.
    """
    seeds = sorted(set(values).intersection(*others))
    if not seeds:
        return None
    table = np.array([[one[seed] for seed in seeds] for one in (values, *others)])
    weights = np.vstack([np.ones((1, len(seeds))), 1 - np.eye(len(seeds))])
    with np.errstate(divide="ignore", invalid="ignore"):
        means = (weights @ table.T) / weights.sum(axis=1, keepdims=True)
    found = _minus_best([*means.T], minimize)
    half = _half_width(found[1:]) if len(seeds) > 1 else math.nan
    return Estimate(float(found[0]), float(found[0] - half), float(found[0] + half), "seeds")


def mean_of_questions(
    metric: str, scores: Mapping[str, SeedScores], *, one_seed: bool = False
) -> Estimate | None:
    """Return a metric over all questions and seeds with its interval; None without scores.

    Args:
        metric: Its name.
        scores: Scores by metric.
        one_seed: With a single seed, return the interval for new questions alone instead of NaN.
    """
    found = _over_both(metric, [scores], lambda values: values[0], one_seed)
    if found is None:
        return None
    low, high = (float(np.clip(end, *_BOUNDS)) for end in (found.low, found.high))
    return replace(found, low=low, high=high)


def difference_of_questions(
    metric: str,
    scores: Mapping[str, SeedScores],
    others: Mapping[str, SeedScores],
    *,
    one_seed: bool = False,
) -> Estimate | None:
    """Return the paired difference of a metric between two methods; None without scores.

    Seeds and questions that only one of them has are left out.

    Args:
        metric: Its name.
        scores: Scores by metric.
        others: Those of the other method.
        one_seed: As in `mean_of_questions`.
    """
    return _over_both(metric, [scores, others], lambda values: values[0] - values[1], one_seed)


def minus_best_of_questions(
    metric: str,
    scores: Mapping[str, SeedScores],
    others: Sequence[Mapping[str, SeedScores]],
    *,
    minimize: bool = False,
    one_seed: bool = False,
) -> Estimate | None:
    """Return a metric minus the best of others', which is chosen again in each resample.

    Args:
        metric: Its name.
        scores: Scores by metric.
        others: Those of the others, at least one.
        minimize: Whether a lower value is better.
        one_seed: As in `mean_of_questions`.

    Returns:
        The difference over common seeds and questions; None without scores.
    """
    return _over_both(
        metric, [scores, *others], lambda values: _minus_best(values, minimize), one_seed
    )


def _minus_best(values: Sequence[Array], minimize: bool) -> Array:
    best = np.min if minimize else np.max
    found: Array = values[0] - best(np.stack(values[1:]), axis=0)
    return found


def _over_both(
    metric: str,
    methods: Sequence[Mapping[str, SeedScores]],
    combine: Callable[[list[Array]], Array],
    one_seed: bool,
) -> Estimate | None:
    """Return a value with an interval for new seeds and new questions.

    A question has similar outcomes with all seeds, so pairs of both are not independent. The value
    is computed again without each seed, and without each question (delete-one jackknife: Efron and
    Stein 1981, Annals of Statistics 9). Each of the two variances has Student's quantile for its
    own number, because few seeds estimate a variance badly; the squares of the two half widths are
    added. The variation of single pairs is in both, so the interval is a little wide.
    """
    parts = HARMONIC.get(metric, (metric,))
    if any(not method.get(part) for method in methods for part in parts):
        return None
    seeds = sorted(set.intersection(*(set(m[part]) for m in methods for part in parts)))
    if not seeds:
        return None
    # Not all questions have all parts: their attempts there are 0.
    asked = [{q for seed in seeds for q in method[parts[0]][seed]} for method in methods]
    names = sorted(set.intersection(*asked))
    if not names:
        return None
    tables = [
        [_tables(method[part], methods, part, seeds, names) for part in parts] for method in methods
    ]

    def values(without: int | None) -> Array:
        return combine([_metric(method, without) for method in tables])

    value = float(values(None)[0])
    half = _half_width(values(_QUESTIONS))
    if one_seed and len(seeds) == 1:
        return Estimate(value, value - half, value + half, "questions")
    half = math.hypot(half, _half_width(values(_SEEDS)))
    return Estimate(value, value - half, value + half, "questions and seeds")


def _half_width(without_each: Array) -> float:
    """Return half of Student's interval from the values without each unit; NaN for one unit."""
    found = without_each[~np.isnan(without_each)]
    count = len(found)
    if count < 2:
        return math.nan
    variance = (count - 1) / count * float(((found - found.mean()) ** 2).sum())
    return _quantile(count) * math.sqrt(variance)


def _quantile(count: int) -> float:
    """Return the 97.5% quantile of Student's t for a mean of that many values."""
    freedom = count - 1
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Abramowitz and Stegun 1964, 26.7.5; the error is below 1e-4.
    first, second = _Z**3 + _Z, 5 * _Z**5 + 16 * _Z**3 + 3 * _Z
    return _Z + first / (4 * freedom) + second / (96 * freedom**2)


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


def _metric(tables: Sequence[tuple[Array, Array]], without: int | None) -> Array:
    """Return the metric [1], or without each seed or question; the harmonic mean of several parts.

    Args:
        tables: Successes and attempts [seeds, questions] of each part.
        without: Axis of the unit that is left out; None for none.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [_sums(right, without) / _sums(asked, without) for right, asked in tables]
        if len(shares) == 1:
            return shares[0]
        harmonic: Array = len(shares) / np.sum([1 / share for share in shares], axis=0)
    return harmonic


def _sums(values: Array, without: int | None) -> Array:
    """Return the sum of a table as [1], or the sums without each row or column."""
    if without is None:
        return np.atleast_1d(values.sum())
    others: Array = values.sum() - values.sum(axis=1 - without)
    return others


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
