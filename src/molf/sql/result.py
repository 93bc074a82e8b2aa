"""What running a query gave, read from a worker's reply."""

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
        rows: What the query returned; for INSERT, UPDATE and DELETE the touched table's rows
            afterwards, in no particular order; for a query that makes, alters or drops tables,
            views, indexes or triggers one row for each there is afterwards (its type, name, table
            and column names). None after a failure.
        columns: Number of columns.
        effect: Which of these three `rows` is.
        table: The touched table, for `effect="table"`.
        error: None, or what went wrong: `"sql"` (SQLite refuses the statement), `"denied"` (it does
            what generated SQL may not), `"time"`, `"rows"`, `"size"`, `"memory"` (over a limit),
            `"crash"` (the worker died).
        stage: Whether the schema or the query failed. A worker that had to be killed cannot tell,
            which counts as the query.
        message: A failure in words.
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
        """The failure in two words, such as "query: time", to count failures by."""
        return f"{self.stage}: {self.error}"


def failure(kind: ErrorKind, message: str, stage: Stage = "query") -> QueryResult:
    """The result of a query that failed."""
    return QueryResult(error=kind, stage=stage, message=message)


def parse_reply(payload: bytes) -> QueryResult:
    """Read a worker's reply, which is not trusted: hostile SQL may have taken the worker over.

    Raises:
        ValueError: The reply is not one that a worker gives.
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
    if any(len(row) != columns for row in rows):
        raise ValueError("rows of the wrong length")
    return QueryResult(rows=rows, columns=columns, effect=effect, table=table)


def _value(value: object) -> Value:
    if isinstance(value, dict) and value.keys() == {"blob"}:
        return bytes.fromhex(value["blob"])
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return value
    raise ValueError("a value that SQLite does not have")
