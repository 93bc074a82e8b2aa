"""`molf train` in several processes, as a launcher starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from forked import forking
from killed_run import interrupt
from molf.cli import main


class Ended(NamedTuple):
    """A process that has ended: its exit code, and what it printed."""

    code: int | None
    output: str
    errors: str


class Launcher:
    """Starts commands in processes that have all libraries already.

    Args:
        folder: Folder for what they print.
    """

    def __init__(self, folder: Path) -> None:
        self._context = forking()
        self._folder = folder

    def __call__(
        self,
        arguments: Sequence[str],
        count: int = 2,
        at: tuple[int, Any] | None = None,
        patience: float = 30.0,
        before: Mapping[int, Callable[[], object]] | None = None,
    ) -> list[Ended]:
        """Run a command in each process.

        Args:
            arguments: Those of `molf`.
            count: Number of processes.
            at: A rank, and the arguments of `killed_run.interrupt` there.
            patience: Seconds until the others are killed after one has failed.
            before: Called in some ranks before the command; picklable.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(count):
            moment = at[1] if at is not None and at[0] == rank else None
            first = (before or {}).get(rank)
            given = (rank, count, port, list(arguments), self._folder, moment, first)
            processes.append(self._context.Process(target=_run, args=given))
            processes[-1].start()
        _end(processes, patience)
        return [
            Ended(
                process.exitcode, *(_file(self._folder, x, r).read_text() for x in ("out", "err"))
            )
            for r, process in enumerate(processes)
        ]

    def to_the_end(self, arguments: Sequence[str], count: int = 2, **further: Any) -> list[Ended]:
        """Run a command that succeeds."""
        ended = self(arguments, count, **further)
        assert all(one.code == 0 for one in ended), [one.errors for one in ended]
        return ended


def _end(processes: Sequence[ForkServerProcess], patience: float) -> None:
    """Wait for all processes; after one has failed, kill those that have not ended in time."""
    waiting, deadline = list(processes), None
    while waiting:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        wait([process.sentinel for process in waiting], timeout=left)
        ended = [process for process in waiting if process.exitcode is not None]
        waiting = [process for process in waiting if process not in ended]
        if deadline is None and any(process.exitcode for process in ended):
            deadline = time.monotonic() + patience
        if deadline is not None and time.monotonic() >= deadline:
            for process in waiting:
                process.kill()
            deadline = None


def _file(folder: Path, name: str, rank: int) -> Path:
    return folder / f"{name}-{rank}.txt"


def _run(
    rank: int,
    count: int,
    port: int,
    arguments: list[str],
    folder: Path,
    moment: Any,
    first: Callable[[], object] | None,
) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # workers of data loaders, as usual
    for name, descriptor in (("out", 1), ("err", 2)):
        # The descriptors as well: libraries print from C++.
        file = _file(folder, name, rank).open("w", buffering=1, encoding="utf-8")
        os.dup2(file.fileno(), descriptor)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if moment is not None:
        interrupt(*moment)
    if first is not None:
        first()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
