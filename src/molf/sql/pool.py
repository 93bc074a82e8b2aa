"""A pool of workers, started when needed and replaced when broken."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self, TypeVar

from molf.disk.files import scratch_directory
from molf.sql.worker import Worker

Reply = TypeVar("Reply")


class WorkerPool:
    """Up to `size` workers, each used by one thread at a time. A context manager.

    Args:
        module: The module that the workers run.
        settings: The first message to each worker.
        size: Largest number of workers.
        paths: Import folders beside the standard library and this package.

    Raises:
        ValueError: `size` is below 1.
    """

    def __init__(
        self, module: str, settings: dict[str, Any], size: int = 1, paths: tuple[str, ...] = ()
    ) -> None:
        if size < 1:
            raise ValueError(f"Invalid number of workers: {size}. Must be at least 1.")
        self._module = module
        self._settings = settings
        self._paths = paths
        self._size = size
        self._closed = False
        scratch = ExitStack()
        self._folder = scratch.enter_context(scratch_directory("worker"))
        self._remove_folder = weakref.finalize(self, scratch.close)
        # None is a worker to start, or to replace. Last in, first out: no more workers are started
        # than are used at the same time.
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    @property
    def folder(self) -> str:
        """The workers' working directory, which stays empty."""
        return str(self._folder)

    def ask(
        self,
        request: dict[str, Any],
        seconds: float,
        max_bytes: int,
        parse: Callable[[bytes], Reply],
    ) -> Reply:
        """Send a request to a free worker, waiting for one, and wait for the reply.

        Args:
            request: JSON values.
            seconds: Time after which the worker is killed.
            max_bytes: Largest reply in bytes.
            parse: Converts the reply; if it raises ValueError, the worker is replaced too.

        Raises:
            WorkerError: There is no reply; the next request gets a new worker.
            RuntimeError: No worker could be started, or the pool is closed.
            ValueError: From `parse`.
        """
        if self._closed:
            raise RuntimeError("The worker pool is closed.")
        worker = self._idle.get()
        kept = None
        try:
            if worker is None or not worker.usable:
                if worker is not None:
                    worker.close()
                worker = Worker(self._module, self._settings, self.folder, self._paths)
            reply = parse(worker.ask(request, seconds, max_bytes))
            kept = worker
        finally:
            if kept is None and worker is not None:
                worker.close()
            self._idle.put(kept)
        return reply

    def close(self) -> None:
        """Wait for running requests, end the workers and remove their folder."""
        if self._closed:
            return
        self._closed = True
        for _ in range(self._size):
            worker = self._idle.get()
            if worker is not None:
                worker.close()
        self._remove_folder()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
