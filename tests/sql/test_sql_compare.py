import random

import pytest

from molf.sql.compare import same_result, same_set
from molf.sql.result import QueryResult, failure


def result(*rows, columns=None, **others):
    width = len(rows[0]) if rows else columns
    return QueryResult(rows=list(rows), columns=width, **others)


def same(gold, predicted, ordered=False):
    answer = same_result(gold, predicted, ordered=ordered)
    assert same_result(predicted, gold, ordered=ordered) is answer
    return answer


@pytest.mark.parametrize(
    ("gold", "value", "equal"),
    [
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (1e15 + 0.5, 1e15, True),
        (1.0, 1.000001, False),
        (0.1 + 0.2 - 0.3, 0, True),
        (2**53, 2**53 + 1, False),
        (9223372036854775807, 9223372036854775806, False),
        (float("inf"), float("inf"), True),
        (float("inf"), float("-inf"), False),
        (None, None, True),
        (None, 0, False),
        (None, "", False),
        ("1", 1, False),
        ("a", "A", False),
        ("a", b"a", False),
        (b"a", b"a", True),
        ("\udcff", "\udcff", True),
    ],
)
def test_values(gold, value, equal):
    assert same(result((gold,)), result((value,))) is equal
    assert same(result((gold,)), result((value,)), ordered=True) is equal


def test_rows_are_a_multiset_unless_ordered():
    gold = result((1, "a"), (2, "b"), (2, "b"))
    turned = result((2, "b"), (1, "a"), (2, "b"))
    fewer = result((1, "a"), (2, "b"))
    other = result((1, "a"), (1, "a"), (2, "b"))
    assert same(gold, turned)
    assert not same(gold, turned, ordered=True)
    assert not same(gold, fewer)
    assert not same(gold, other)
    assert same_set(gold, turned)
    assert same_set(gold, fewer)
    assert same_set(gold, other)
    assert not same_set(gold, result((1, "a")))


def test_columns_must_match_in_number_and_order():
    assert not same(result((1, 2)), result((2, 1)))
    assert not same(result(columns=1), result(columns=2))
    assert same(result(columns=2), result(columns=2))
    assert same_set(result(columns=1), result(columns=2))  # the reference sees no columns


def test_noise_does_not_decide_over_the_order_of_later_columns():
    gold = result((10.0, 1), (10.0, 2), (10.0, 3))
    noisy = result((9.999999999999998, 2), (10.0, 1), (10.000000000000002, 3))
    assert same(gold, noisy)
    assert not same(gold, result((9.999999999999998, 2), (10.0, 1), (10.0, 1)))


def test_values_of_all_types_in_any_order():
    rows = [(v, w) for v in (None, 1, 2.5, "a", b"a", 2**60, 1e300, -0.0) for w in (None, "x", 3)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert same(result(*rows), result(*shuffled))


def test_changes_are_compared_with_changes_of_the_same_table():
    gold = result((1,), (2,), effect="table", table="T")
    assert same(gold, result((2,), (1,), effect="table", table="t"))
    assert same(gold, result((2,), (1,), effect="table", table="t"), ordered=True)
    assert not same(gold, result((1,), (2,), effect="table", table="u"))
    assert not same(gold, result((1,), (2,)))
    assert not same_set(gold, result((1,), (2,)))


def test_failures():
    assert not same_result(result((1,)), failure("time", ""), ordered=False)
    assert not same_set(result((1,)), failure("sql", ""))
    with pytest.raises(ValueError, match="gold query failed"):
        same_result(failure("sql", ""), result((1,)), ordered=False)
