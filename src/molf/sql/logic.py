"""Logic match: equality of the normalised syntax trees of two queries."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

from molf.sql.limits import is_longer
from molf.sql.pool import WorkerPool
from molf.sql.worker import WorkerError

_MAX_BYTES = 64 * 2**10  # of one query; real queries have a few hundred
_MAX_REPLY_BYTES = 2**21
_ADDRESS_SPACE_BYTES = 2**30
_GRACE_SECONDS = 0.5


class LogicMatcher(WorkerPool):
    """Normalises queries with sqlglot in separate processes. A context manager.

    Hostile text can make a pure Python parser run almost forever; a process can be killed.

    Args:
        seconds: Time limit for one text.
        workers: Number of processes, each used by one thread at a time.
    """

    def __init__(self, seconds: float = 2.0, workers: int = 1) -> None:
        settings = {"seconds": seconds, "address_space_bytes": _ADDRESS_SPACE_BYTES}
        self._seconds = seconds
        # Workers start without site-packages, so they get the folder that sqlglot is in.
        sqlglot = find_spec("sqlglot")
        folder = str(Path(str(sqlglot and sqlglot.origin)).parents[1])
        super().__init__("molf.sql.normal_form", settings, workers, (folder,))

    def match(self, gold: str, predicted: str) -> bool:
        """Return whether both texts are one statement each, with the same normal form.

        The logical form accuracy of Zhong et al. 2017, on syntax trees instead of texts: parsed by
        sqlglot as SQLite's dialect, aliases dropped, printed normalised (`molf.sql.normal_form`). A
        text that cannot be parsed, or not in time, matches nothing.
        """
        # The prediction first: most that fail cannot be parsed.
        form = self.normal_form(predicted)
        return form is not None and form == self.normal_form(gold)

    def normal_form(self, sql: str) -> str | None:
        """Return the normal form of a query; None where there is none. No text raises an error.

        Raises:
            RuntimeError: No worker could be started, or the matcher is closed.
        """
        if is_longer(sql, _MAX_BYTES):
            return None
        seconds = self._seconds + _GRACE_SECONDS
        try:
            return self.ask({"sql": sql}, seconds, _MAX_REPLY_BYTES, _parse_reply)
        except (WorkerError, ValueError):
            return None


def _parse_reply(payload: bytes) -> str | None:
    reply = json.loads(payload)
    if reply is None or isinstance(reply, str):
        return reply
    raise ValueError("A worker's reply is not a text.")
