"""The sandbox: all SQL, generated or gold, is run by it."""

from __future__ import annotations

from dataclasses import asdict

from molf.sql.limits import Limits, is_longer
from molf.sql.pool import WorkerPool
from molf.sql.result import QueryResult, Stage, failure, parse_reply
from molf.sql.worker import WorkerError

_GRACE_SECONDS = 0.5  # for a worker to report its own time limit before it is killed
_REPLY_OVERHEAD = 2**16  # bytes of a reply beside its rows


class Sandbox(WorkerPool):
    """Runs queries in locked-down processes. A context manager; threads may share it.

    Each query gets a new in-memory SQLite database that cannot attach databases, load extensions,
    or read or write files; its process cannot open files. A query that exceeds `limits`, or makes
    its process crash or hang, fails, and the process is replaced.

    Args:
        limits: Limits of a query.
        workers: Number of processes, each used by one thread at a time.

    Raises:
        ValueError: `workers` is below 1.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 1) -> None:
        self.limits = limits or Limits()
        super().__init__("molf.sql.database", asdict(self.limits), workers)

    def run(self, schema: str, query: str) -> QueryResult:
        """Run a schema and one statement on it; no text of either raises an error.

        Args:
            schema: CREATE TABLE, INSERT and the like, any number of statements.
            query: One statement.

        Raises:
            RuntimeError: No worker could be started, or the sandbox is closed.
        """
        return self._ask_result({"schema": schema, "query": query})

    def unchanged(self, schema: str, result: QueryResult) -> QueryResult:
        """Return the result of a statement of the same effect that finds and changes nothing.

        Args:
            schema: As in `run`.
            result: A result on that schema; only its effect, columns and table are used.

        Raises:
            RuntimeError: No worker could be started, or the sandbox is closed.
        """
        if result.effect == "rows":
            return QueryResult(rows=[], columns=result.columns)
        return self._ask_result({"schema": schema, "table": result.table})

    def _ask_result(self, request: dict[str, str | None]) -> QueryResult:
        stages: tuple[Stage, ...] = ("schema", "query")
        for stage in stages:
            # Before the text is sent: it may have gigabytes.
            if is_longer(request.get(stage) or "", self.limits.sql_bytes):
                message = f"longer than {self.limits.sql_bytes} bytes"
                return failure("size", message, stage)
        try:
            return self.ask(
                request,
                self.limits.seconds + _GRACE_SECONDS,
                self.limits.result_bytes + _REPLY_OVERHEAD,
                parse_reply,
            )
        except WorkerError as error:
            return failure("time" if error.timed_out else "crash", str(error))
        except ValueError as error:
            return failure("crash", str(error))
