"""The result of a query, read from a worker's reply."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Value = str | int | float | bytes | None
Row = tuple[Value, ...]

ErrorKind = Literal["sql", "denied", "time", "rows", "size", "memory", "crash"]
Stage = Literal["schema", "query"]
Effect = Literal["rows", "table", "schema"]


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """The result of a query, or why there is none.

    Attributes:
        rows: For a query, its rows. For INSERT, UPDATE and DELETE, all rows of the changed table
            afterwards, unordered. For a query that creates, alters or drops tables, views, indexes
            or triggers, one row for each that exists afterwards (type, name, table, columns, rows).
            None after a failure.
        columns: Number of columns.
        effect: Which of these three kinds `rows` is: "rows", "table" or "schema".
        table: The changed table, for `effect="table"`.
        error: None, or the kind of failure: `"sql"` (SQLite rejects the statement), `"denied"`
            (an action outside the allow list), `"time"`, `"rows"`, `"size"`, `"memory"` (a limit
            is exceeded), `"crash"` (the worker died).
        stage: Whether the schema or the query failed; "query" where the worker was killed.
        message: The failure's message.
    """

    rows: list[Row] | None = None
    columns: int = 0
    effect: Effect = "rows"
    table: str | None = None
    error: ErrorKind | None = None
    stage: Stage | None = None
    message: str = ""

    @property
    def ok(self) -> bool:
        """Whether there is a result."""
        return self.error is None

    @property
    def reason(self) -> str:
        """Stage and kind of the failure, such as "query: time", for counts of failures."""
        return f"{self.stage}: {self.error}"


def failure(kind: ErrorKind, message: str, stage: Stage = "query") -> QueryResult:
    """Return the result of a failed query."""
    return QueryResult(error=kind, stage=stage, message=message)


def parse_reply(payload: bytes) -> QueryResult:
    """Parse and check a worker's reply; it is untrusted, since hostile SQL may control the worker.

    Raises:
        ValueError: The reply has another form.
    """
    try:
        return _read(json.loads(payload))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"Not a worker's reply: {error}") from error


def _read(reply: dict[str, Any]) -> QueryResult:
    if "error" in reply:
        kind, stage, message = reply["error"], reply["stage"], reply["message"]
        if kind not in get_args(ErrorKind) or stage not in get_args(Stage):
            raise ValueError("an unknown failure")
        return failure(kind, str(message), stage)
    effect, columns, table = reply["effect"], reply["columns"], reply["table"]
    if (
        effect not in get_args(Effect)
        or not isinstance(columns, int)
        or not (table is None or isinstance(table, str))
    ):
        raise ValueError("an unknown effect")
    rows = [tuple(_value(value) for value in row) for row in reply["rows"]]
    # `compare` relies on equal lengths.
    if any(len(row) != columns for row in rows):
        raise ValueError("rows of the wrong length")
    return QueryResult(rows=rows, columns=columns, effect=effect, table=table)


def _value(value: object) -> Value:
    if isinstance(value, dict) and value.keys() == {"blob"}:
        return bytes.fromhex(value["blob"])
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return value
    raise ValueError("a value that SQLite does not have")
