"""The one door through which SQL is run, generated or not."""

from __future__ import annotations

from molf.sql.limits import Limits, is_longer
from molf.sql.pool import WorkerPool
from molf.sql.result import QueryResult, Stage, failure, parse_reply
from molf.sql.worker import WorkerError

_GRACE_SECONDS = 0.5  # for a worker to notice the time itself, before it is killed
_REPLY_OVERHEAD = 2**16  # bytes of a reply beside its rows


class Sandbox:
    """Runs queries in locked-down processes. A context manager; threads may share it.

    Each query gets an in-memory SQLite database of its own, which may neither attach another nor
    load, read or write anything outside, in a process that may not open files. What exceeds
    `limits`, kills its process or makes it hang is a failed query, and the process is replaced.

    Args:
        limits: How much a query may use.
        workers: How many queries run at the same time, from as many threads.

    Raises:
        ValueError: `workers` is below 1.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 1) -> None:
        self.limits = limits or Limits()
        self._pool = WorkerPool("molf.sql.database", self.limits.as_settings(), workers)

    @property
    def folder(self) -> str:
        """The workers' working directory, which stays empty."""
        return self._pool.folder

    def run(self, schema: str, query: str) -> QueryResult:
        """Run a schema and one statement on it. Nothing in either text raises.

        Args:
            schema: CREATE TABLE, INSERT and the like, any number of statements.
            query: One statement.

        Raises:
            RuntimeError: No worker could be started, or the sandbox is closed.
        """
        return self._ask({"schema": schema, "query": query})

    def unchanged(self, schema: str, result: QueryResult) -> QueryResult:
        """What a statement of the same kind gives that finds and changes nothing.

        Args:
            schema: As in `run`.
            result: A result on that schema: of the same effect is the one returned.

        Raises:
            RuntimeError: No worker could be started, or the sandbox is closed.
        """
        if result.effect == "rows":
            return QueryResult(rows=[], columns=result.columns)
        return self._ask({"schema": schema, "table": result.table})

    def _ask(self, request: dict[str, str | None]) -> QueryResult:
        stages: tuple[Stage, ...] = ("schema", "query")
        for stage in stages:
            if is_longer(request.get(stage) or "", self.limits.sql_bytes):
                message = f"longer than {self.limits.sql_bytes} bytes"
                return failure("size", message, stage)
        try:
            return self._pool.ask(
                request,
                self.limits.seconds + _GRACE_SECONDS,
                self.limits.result_bytes + _REPLY_OVERHEAD,
                parse_reply,
            )
        except WorkerError as error:
            return failure("time" if error.timed_out else "crash", str(error))
        except ValueError as error:
            return failure("crash", str(error))

    def close(self) -> None:
        """Wait for running queries and end the workers."""
        self._pool.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
