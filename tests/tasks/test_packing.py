"""Packing joins whole examples, by TRL's best-fit decreasing strategy."""

import random

import pytest

from molf.data.packing import pack


def test_every_example_is_in_one_row_as_a_whole():
    """More than are packed at a time."""
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(12_500)]
    rows = pack(lengths, 100)
    assert sorted(position for row in rows for position in row) == list(range(12_500))
    tokens = [sum(lengths[position] for position in row) for row in rows]
    assert max(tokens) <= 100
    # Best fit of many at once: hardly any room is left.
    assert sum(lengths) / (100 * len(rows)) > 0.99
    assert rows == pack(lengths, 100)


@pytest.mark.parametrize(
    ("lengths", "most", "rows"),
    [
        ([2, 5, 3, 4, 1], 5, [[1], [3, 4], [0, 2]]),
        ([5], 5, [[0]]),
        ([1, 1, 1], 2**31 - 1, [[0, 1, 2]]),  # TRL's search tree would have this size
        ([3, 3], 5, [[0], [1]]),
    ],
)
def test_longest_first_into_the_fullest_row(lengths, most, rows):
    assert sorted(map(sorted, pack(lengths, most))) == sorted(rows)
