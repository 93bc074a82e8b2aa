"""The worker that runs SQL: one in-memory SQLite database per request.

This module runs in the worker and imports only the standard library.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from molf.sql.authorizer import Authorizer
from molf.sql.limits import Limits
from molf.sql.serve import Handler, restrict_process, serve
from molf.sql.text import first_word

_INSTRUCTIONS_PER_CHECK = 2000  # of SQLite's virtual machine, between two checks of the time
_MAX_MESSAGE = 300  # characters of an error message, which may quote the query


class _LimitError(Exception):
    """A result exceeds a limit; the argument is the kind of failure."""


def main() -> None:
    """Serve requests; the settings are `Limits`.

    A request is `{"schema": text, "query": text}` for `run`, or
    `{"schema": text, "table": text or null}` for `unchanged`.
    """
    serve(_prepare)


def _prepare(settings: dict[str, Any]) -> Handler:
    limits = Limits(**settings)
    run(limits, "CREATE TABLE t (a)", "SELECT a, date('now', 'localtime') FROM t")  # warm up
    restrict_process(limits.address_space_bytes, open_files=False)

    def handle(request: dict[str, Any]) -> str:
        if "query" in request:
            return run(limits, request["schema"], request["query"])
        return unchanged(limits, request["schema"], request["table"])

    return handle


def run(limits: Limits, schema: str, query: str) -> str:
    """Run a schema and a query on it in a new database.

    Returns:
        JSON text, for success `{"effect", "columns", "table", "rows"}` (see `QueryResult`), for
        failure `{"error", "stage", "message"}`.
    """
    return _in_new_database(
        limits, schema, lambda connection, asked: _run_query(connection, query, asked, limits)
    )


def unchanged(limits: Limits, schema: str, table: str | None) -> str:
    """Return the result of a statement that changes no row of a table; None: of a schema change.

    Returns:
        JSON text as of `run`.
    """

    def read(connection: sqlite3.Connection, _: Authorizer) -> str:
        if table is None:
            return _schema_reply(connection, limits)
        return _table_reply(connection, table, _quoted(table), limits)

    return _in_new_database(limits, schema, read)


def _in_new_database(
    limits: Limits, schema: str, act: Callable[[sqlite3.Connection, Authorizer], str]
) -> str:
    """Run a schema, then `act`; return its reply, or a reply with the failure."""
    deadline = time.monotonic() + limits.seconds
    authorizer = Authorizer()
    stage = "schema"
    try:
        connection = _open(limits, authorizer, deadline)
        try:
            connection.executescript(schema)
            stage = "query"
            authorizer.begin_statement()
            return act(connection, authorizer)
        finally:
            connection.close()
    except MemoryError:
        return _failure("memory", stage, "out of memory")
    except _LimitError as error:
        return _failure(str(error), stage, f"the result exceeds the limit on {error}")
    except Exception as error:  # hostile input may raise anything: it is a failed query
        kind = "sql"
        if authorizer.denied:
            # By the authorizer's record: the messages of SQLite differ between versions.
            kind = "denied"
        elif time.monotonic() > deadline:
            kind = "time"
        elif isinstance(error, sqlite3.DataError) and "too big" in str(error):
            kind = "size"
        return _failure(kind, stage, str(error))


def _open(limits: Limits, authorizer: Authorizer, deadline: float) -> sqlite3.Connection:
    """Open a new database with all limits set; afterwards PRAGMA is denied."""
    # No cache of statements: each request has its own database.
    connection = sqlite3.connect(":memory:", isolation_level=None, cached_statements=0)
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    connection.execute(f"PRAGMA hard_heap_limit = {limits.memory_bytes}")
    # Sorting must not open temporary files.
    connection.execute("PRAGMA temp_store = MEMORY")
    # Views and triggers of a hostile schema cannot call functions with side effects.
    connection.execute("PRAGMA trusted_schema = OFF")
    for category, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, limits.value_bytes),
        (sqlite3.SQLITE_LIMIT_SQL_LENGTH, limits.sql_bytes),
        (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 250),
        (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 500),
        (sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000),
        (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 20),
        (sqlite3.SQLITE_LIMIT_VDBE_OP, 250_000),
        (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):
        connection.setlimit(category, value)
    if sys.version_info >= (3, 12):
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DEFENSIVE, True)
    connection.set_progress_handler(
        lambda: int(time.monotonic() > deadline), _INSTRUCTIONS_PER_CHECK
    )
    # Last, because it denies the pragmas above.
    connection.set_authorizer(authorizer)
    return connection


def _run_query(
    connection: sqlite3.Connection, query: str, authorizer: Authorizer, limits: Limits
) -> str:
    cursor = connection.execute(query)
    word = first_word(query)
    if not word:
        raise sqlite3.ProgrammingError("There is no statement.")
    rows = _encoded(cursor, limits)  # also where they are not the result: fetching runs the query
    if word != "EXPLAIN":  # EXPLAIN of a change does not run the change
        if authorizer.changes_schema:
            return _schema_reply(connection, limits)
        if authorizer.changed_table is not None:
            database, table = authorizer.changed_table
            return _table_reply(connection, table, f"{_quoted(database)}.{_quoted(table)}", limits)
    return _reply("rows", None, _width(cursor), rows)


def _schema_reply(connection: sqlite3.Connection, limits: Limits) -> str:
    return _reply("schema", None, 5, _encoded(_schema_rows(connection, limits), limits))


def _table_reply(connection: sqlite3.Connection, table: str, quoted: str, limits: Limits) -> str:
    cursor = connection.execute(f"SELECT * FROM {quoted}")
    return _reply("table", table, _width(cursor), _encoded(cursor, limits))


def _reply(effect: str, table: str | None, columns: int, rows: list[str]) -> str:
    head = json.dumps({"effect": effect, "columns": columns, "table": table})
    return f'{head[:-1]}, "rows": [{",".join(rows)}]}}'


def _width(cursor: sqlite3.Cursor) -> int:
    return len(cursor.description or ())


def _schema_rows(connection: sqlite3.Connection, limits: Limits) -> Iterable[tuple[object, ...]]:
    """Yield type, name, table, columns and rows of every table, view, index and trigger, unordered.

    The rows are one JSON text, in an order that depends on them alone.
    """
    for kind, name, table in connection.execute(
        "SELECT type, name, tbl_name FROM sqlite_master UNION ALL "
        "SELECT type, name, tbl_name FROM sqlite_temp_master"
    ).fetchall():
        if name.lower().startswith("sqlite_"):
            continue  # internal to SQLite
        columns = rows = None
        if kind in ("table", "view"):
            try:
                cursor = connection.execute(f"SELECT * FROM {_quoted(name)}")
                # As texts, numbers are compared without a tolerance.
                found = (tuple(map(_rounded, row)) for row in cursor)
                rows = f"[{','.join(sorted(_encoded(found, limits)))}]"
            except sqlite3.OperationalError as error:  # a view of a dropped table
                if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                    raise
                columns = "unusable"
            else:
                columns = json.dumps([column[0].lower() for column in cursor.description])
        yield kind, name.lower(), table.lower(), columns, rows


def _rounded(value: object) -> object:
    return float(f"{value:.8e}") if isinstance(value, float) else value


def _encoded(rows: Iterable[tuple[object, ...]], limits: Limits) -> list[str]:
    """Encode each row as JSON text; stop at the first row beyond a limit."""
    encoded: list[str] = []
    size = 0
    for row in rows:
        if len(encoded) == limits.rows:
            raise _LimitError("rows")
        lengths = (len(value) for value in row if isinstance(value, (str, bytes)))
        if size + sum(lengths) > limits.result_bytes:  # known before encoding
            raise _LimitError("size")
        encoded.append(json.dumps([_plain(value) for value in row], separators=(",", ":")))
        size += len(encoded[-1]) + 1
        if size > limits.result_bytes:
            raise _LimitError("size")
    return encoded


def _plain(value: object) -> object:
    return {"blob": value.hex()} if isinstance(value, bytes) else value


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _failure(kind: str, stage: str, message: str) -> str:
    return json.dumps({"error": kind, "stage": stage, "message": message[:_MAX_MESSAGE]})
