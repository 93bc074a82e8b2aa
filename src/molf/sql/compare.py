"""Comparison of two query results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from molf.sql.result import QueryResult, Row, Value

RELATIVE_TOLERANCE = 1e-9
"""For numbers that are not both integers: float sums depend on the order of summation."""

ABSOLUTE_TOLERANCE = 1e-12
"""For the same numbers near 0, such as differences of equal sums."""


def same_result(gold: QueryResult, predicted: QueryResult, *, ordered: bool) -> bool:
    """Return whether two results are equal: execution accuracy (Zhong et al. 2017).

    In contrast to that paper, duplicates count, and order counts where the gold query has one.

    Both must have the same number of columns; their names do not matter. Numbers are equal by value
    (1 and 1.0; with a float, up to `RELATIVE_TOLERANCE` or `ABSOLUTE_TOLERANCE`), texts and blobs
    exactly, and NULL equals NULL. A query that changes a table is compared with one that changes
    the same table, by the rows of that table afterwards.

    Args:
        gold: Must have succeeded.
        predicted: A failure is never the same.
        ordered: Compare row by row instead of as multisets. Where the gold order leaves ties, only
            the order in which SQLite gives them counts as right.
    """
    if not _comparable(gold, predicted) or gold.columns != predicted.columns:
        return False
    gold_rows, rows = gold.rows or [], predicted.rows or []
    if len(gold_rows) != len(rows):
        return False
    if not (ordered and gold.effect == "rows"):
        gold_rows, rows = _in_canonical_order(gold_rows), _in_canonical_order(rows)
    pairs = zip(gold_rows, rows, strict=True)
    return all(all(map(_same_value, gold_row, row)) for gold_row, row in pairs)


def same_set(gold: QueryResult, predicted: QueryResult) -> bool:
    """Return whether the sets of rows are equal, as in the paper's reference code.

    Duplicates and order are ignored; numbers are compared by exact value.
    """
    return _comparable(gold, predicted) and set(gold.rows or []) == set(predicted.rows or [])


def _comparable(gold: QueryResult, predicted: QueryResult) -> bool:
    if not gold.ok:
        raise ValueError(f"The gold query failed ({gold.reason}).")
    return (
        predicted.ok
        and gold.effect == predicted.effect
        and (gold.table or "").lower() == (predicted.table or "").lower()
    )


def _same_value(gold: Value, value: Value) -> bool:
    if isinstance(gold, (int, float)) and isinstance(value, (int, float)):
        if isinstance(gold, int) and isinstance(value, int):
            return gold == value
        return math.isclose(gold, value, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
    return type(gold) is type(value) and gold == value


def _in_canonical_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows so that equal multisets have equal order, up to the tolerance of numbers.

    Numbers are sorted by nine digits first, so that rounding errors in one column do not take
    precedence over the next column. Rows may still be swapped where such an error crosses a
    rounding boundary.
    """
    return sorted(rows, key=lambda row: ([_coarse(v) for v in row], [_exact(v) for v in row]))


def _coarse(value: Value) -> tuple[int, float | str | bytes]:
    if isinstance(value, (int, float)):
        return 1, 0.0 if abs(value) < ABSOLUTE_TOLERANCE else float(f"{value:.8e}")
    return _exact(value)


def _exact(value: Value) -> tuple[int, float | str | bytes]:
    """Return a sort key for values of any type: NULL, numbers, texts, blobs."""
    if value is None:
        return 0, 0
    if isinstance(value, (int, float)):
        return 1, value
    return (2, value) if isinstance(value, str) else (3, value)
