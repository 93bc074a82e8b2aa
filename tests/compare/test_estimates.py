"""Differences to the best of several, over seeds and over questions."""

import math

import numpy as np
import pytest

from molf.measure.estimates import (
    difference_of_questions,
    mean_of_questions,
    minus_best_of_questions,
    minus_best_over_seeds,
    over_seeds,
)


def test_one_other_is_the_paired_difference():
    one, other = {1: 0.5, 2: 0.75, 3: 0.8}, {1: 0.4, 2: 0.5, 3: 0.9, 4: 7.0}
    found = minus_best_over_seeds(one, [other], minimize=False)
    paired = over_seeds([0.1, 0.25, -0.1])
    assert (found.value, found.low, found.high) == pytest.approx(
        (paired.value, paired.low, paired.high)
    )


def test_best_is_chosen_again_without_each_seed():
    one = {1: 1.0, 2: 1.0, 3: 1.0}
    others = [{1: 0.0, 2: 0.6, 3: 0.6}, {1: 0.9, 2: 0.2, 3: 0.2}]
    found = minus_best_over_seeds(one, others, minimize=False)
    assert found.value == pytest.approx(1 - 1.3 / 3)
    without = np.array([1 - 0.6, 1 - 0.55, 1 - 0.55])  # the best: first, second, second
    half = 4.303 * math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    assert found.high - found.value == pytest.approx(half)
    lowest = minus_best_over_seeds(one, others, minimize=True)
    assert lowest.value == pytest.approx(1 - 1.2 / 3)


def test_without_common_seed():
    assert minus_best_over_seeds({1: 1.0}, [{2: 1.0}], minimize=False) is None
    single = minus_best_over_seeds({1: 1.0}, [{1: 0.5}], minimize=False)
    assert single.value == 0.5
    assert math.isnan(single.low)


def scores(*rows):
    """Scores of a metric by seed from right (1) and wrong (0) answers."""
    return {
        "accuracy": {
            seed: {str(i): (float(one), 1.0) for i, one in enumerate(row)}
            for seed, row in enumerate(rows, 1)
        }
    }


def test_questions_of_one_seed():
    """The interval is Student's over questions."""
    one = scores([1, 1, 1, 0, 1, 0, 1, 1])
    found = mean_of_questions("accuracy", one, one_seed=True)
    student = over_seeds([1, 1, 1, 0, 1, 0, 1, 1])
    assert found.units == "questions"
    assert (found.value, found.low) == pytest.approx((student.value, student.low))
    assert found.high == 1.0  # a share
    assert math.isnan(mean_of_questions("accuracy", one).low)
    two = scores([1, 1, 1, 0], [1, 1, 0, 0])
    assert mean_of_questions("accuracy", two, one_seed=True) == mean_of_questions("accuracy", two)


def test_minus_best_of_questions():
    molf, fft, lora = scores([1, 1, 1, 0]), scores([1, 0, 0, 0]), scores([0, 1, 1, 0])
    found = minus_best_of_questions("accuracy", molf, [fft, lora], one_seed=True)
    assert found.value == 0.25
    # Without each question: 2/3 - 2/3, 2/3 - 1/3, 2/3 - 1/3, 1 - 2/3.
    without = np.array([0, 1 / 3, 1 / 3, 1 / 3])
    half = 3.182 * math.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    assert found.high - found.value == pytest.approx(half)
    paired = difference_of_questions("accuracy", molf, lora, one_seed=True)
    assert minus_best_of_questions("accuracy", molf, [lora], one_seed=True) == paired
    partly = {"accuracy": {1: dict(list(fft["accuracy"][1].items())[:2])}}
    common = minus_best_of_questions("accuracy", molf, [lora, partly], one_seed=True)
    assert common.value == 0.5  # of the questions that all three have
