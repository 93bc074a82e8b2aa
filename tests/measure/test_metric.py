import math

import numpy as np
import pytest

from molf.measure.metric import bootstrap, bootstrap_mean, ratio_of_sums, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R: prop.test(x, n, correct = FALSE)$conf.int
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_gives_the_known_intervals(successes, n, low, high):
    metric = wilson(successes, n)
    assert metric.value == successes / n
    assert metric.count == n
    assert (metric.low, metric.high) == pytest.approx((low, high), abs=1e-6)
    assert 0 <= metric.low <= metric.value <= metric.high <= 1


def test_wilson_refuses_impossible_counts():
    for successes, n in [(0, 0), (3, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="Invalid successes"):
            wilson(successes, n)


def test_bootstrap_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(3).normal(5.0, 2.0, size=400)
    metric = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert metric.value == pytest.approx(values.mean())
    assert metric.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert metric.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert metric.count == 400


def test_bootstrap_is_a_function_of_the_seed():
    values = [1.0, 2.0, 5.0, 7.0]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    many = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(many, seed=1) != bootstrap_mean(many, seed=2)


def test_weights_are_those_of_the_observations():
    metric = bootstrap_mean([1.0, 4.0], weights=[3, 1])
    assert metric.value == pytest.approx(1.75)
    assert (metric.low, metric.high) == (1.0, 4.0)  # a resample may hold one of them only


def test_one_observation_says_nothing_of_its_spread():
    metric = bootstrap_mean([2.5])
    assert (metric.value, metric.count) == (2.5, 1)
    assert math.isnan(metric.low)
    assert math.isnan(metric.high)


def test_resamples_without_a_value_do_not_spoil_the_interval():
    # The ratio is 1 wherever the one row that counts is drawn, and undefined elsewhere.
    metric = bootstrap(np.array([[1.0, 1.0], [0.0, 0.0]]), ratio_of_sums)
    assert (metric.value, metric.low, metric.high) == (1.0, 1.0, 1.0)
