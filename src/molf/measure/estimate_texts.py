"""Numbers, values with intervals, and tables, as text and Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from molf.measure.estimates import Estimate
from molf.shown import TextTable


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows),
    ]


def markdown_of(found: TextTable) -> list[str]:
    """Return the lines of a table, without its title."""
    return table(found.columns, found.rows)


def number_text(value: float) -> str:
    """Return a number with three decimals; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.3f}"


def estimate_text(found: Estimate | None) -> str:
    """Return a value with its interval."""
    if found is None:
        return "missing"
    if math.isnan(found.low):
        return number_text(found.value)
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def signed(found: Estimate) -> str:
    """Return a difference with its interval."""
    if math.isnan(found.low):
        return f"{found.value:+.3f}"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
