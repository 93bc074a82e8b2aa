"""Limits of time and memory for a query."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one run, a schema and a query on it. A query that exceeds one fails.

    Attributes:
        seconds: Wall-clock time for the schema and the query together.
        rows: Rows of a result.
        result_bytes: Size of a result, encoded as JSON.
        value_bytes: Size of one text, blob or stored row.
        sql_bytes: Size of each of the two texts, schema and query, in UTF-8.
        memory_bytes: SQLite's heap. The worker's address space is limited to three times as much
            plus 128 MiB for Python.

    Raises:
        ValueError: A limit is not positive.
    """

    seconds: float = 5.0
    rows: int = 100_000
    result_bytes: int = 8 * 2**20
    value_bytes: int = 10**6
    sql_bytes: int = 256 * 2**10
    memory_bytes: int = 128 * 2**20

    def __post_init__(self) -> None:
        """Check every limit."""
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Invalid {name}={value}. Must be positive.")

    @property
    def address_space_bytes(self) -> int:
        """The worker's address space: SQLite's heap, copies of its values, and Python."""
        # Values are copied to Python and then to JSON.
        return 3 * self.memory_bytes + 128 * 2**20


def is_longer(text: str, max_bytes: int) -> bool:
    """Return whether a text has more than `max_bytes` in UTF-8, without encoding huge texts."""
    # Generated text may contain unpaired surrogates, which strict UTF-8 cannot encode.
    return len(text) > max_bytes or len(text.encode("utf-8", "surrogatepass")) > max_bytes
