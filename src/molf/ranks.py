"""The processes of one command that `torchrun` or `accelerate launch` has started.

Rank 0 writes all files of a run and prints; the others compute. Files are written by `on_main`, so
that the code is the same for one process and for many.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from molf.errors import InputError, reason_of

T = TypeVar("T")

# Rank 0 may write or measure for hours while the others wait. The launcher ends all processes if
# one has ended.
_PATIENCE = timedelta(days=7)

# Messages of gloo and NCCL when the process at the other end has ended.
_ENDED = (
    "onnection closed by peer",
    "onnection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
    "Socket closed",
)
# And when it does not answer.
_SILENT = ("Timed out waiting", "Operation timed out", "Timeout waiting", "waiting for clients")


class PeerError(Exception):
    """Another process failed, with an error that cannot be sent; the message is that error's."""


def launched_count() -> int:
    """Return the number of processes of the command; 1 without a launcher."""
    # Some clusters set WORLD_SIZE for their machines. A launcher sets LOCAL_RANK as well.
    return _number("WORLD_SIZE", 1) if "LOCAL_RANK" in os.environ else 1


def launched_rank() -> int:
    """Return the number of this process, from 0."""
    return _number("RANK", 0) if launched_count() > 1 else 0


def check_alone(what: str) -> None:
    """Check that a command that runs in one process was not started as several.

    Args:
        what: The command or option.

    Raises:
        InputError: A launcher started several.
    """
    if (count := launched_count()) > 1:
        raise InputError(
            f"{what} runs in one process, and {count} were started. Start it without torchrun or "
            "accelerate launch, which are for molf train."
        )


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return default


class Ranks:
    """One process alone: nothing is sent.

    All processes call the methods in the same order.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    rank = 0
    count = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def on_main(self, act: Callable[[], T]) -> T:
        """Call `act` in rank 0 while the others wait; all return its result, or raise its error.

        The result must be picklable.
        """
        return act()

    def everywhere(self, act: Callable[[], T]) -> T:
        """Call `act` in each process; if it fails in one, raise that error in all.

        `act` may call collectives only if they fail in all processes when they fail in one.
        """
        return act()

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank; they must be picklable."""
        return [value]

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the maximum of each number over all processes; called in each training step.

        Raises:
            RuntimeError: A process has not called it within the timeout of a step's collectives.
        """
        return list(numbers)

    def further(self) -> Ranks:
        """Return the same processes with a group of their own, for use in another thread."""
        return self

    @property
    def group(self) -> Any:
        """The process group on the CPU; None for one process."""
        return None


class _Launched(Ranks):
    """Several processes, which send objects through the host, by gloo."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._in_steps = self._group
        if timeout is not None:
            self._in_steps = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def group(self) -> Any:
        return self._group

    def on_main(self, act: Callable[[], T]) -> T:
        import torch.distributed as dist

        failed: Exception | None = None
        sent: list[Any] = [None]
        if self.is_main:
            try:
                sent = [(act(), None)]
            except Exception as error:
                failed, sent = error, [(None, _portable(error))]
        dist.broadcast_object_list(sent, src=0, group=self._group)
        result, told = sent[0]
        if told is not None:
            raise failed or told
        return result

    def everywhere(self, act: Callable[[], T]) -> T:
        failed: Exception | None = None
        result: Any = None
        try:
            result = act()
        except Exception as error:
            failed = error
        errors = self.gather(None if failed is None else _portable(failed))
        if failed is not None:
            raise failed
        for told in errors:
            if told is not None:
                raise told
        return result

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def largest(self, numbers: Sequence[int]) -> list[int]:
        import torch
        import torch.distributed as dist

        found = torch.tensor(list(numbers), dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._in_steps)
        return found.tolist()

    def further(self) -> Ranks:
        return _Launched()


def _portable(error: Exception) -> Exception:
    """Return the error, or one with its message if it cannot be sent."""
    try:
        again = pickle.loads(pickle.dumps(error))
    except Exception:
        return PeerError(reason_of(error))
    return again if str(again) == str(error) else PeerError(reason_of(error))


ALONE = Ranks()
_ranks: Ranks = ALONE


def ranks() -> Ranks:
    """Return the processes of this command; one before `connect`."""
    return _ranks


def connect(timeout: timedelta) -> Ranks:
    """Connect the processes of a launched command; torch's process group must exist.

    Every process calls it. Later calls change nothing.

    Args:
        timeout: Longest wait for another process in a training step.
    """
    global _ranks
    if _ranks is ALONE and launched_count() > 1:
        _ranks = _Launched(timeout)
    return _ranks


def lost_process(error: BaseException) -> str | None:
    """Return a line if an error of a collective means that another process ended or hangs."""
    text = str(error)
    if launched_count() == 1 or not isinstance(error, (RuntimeError, OSError)):
        return None
    if any(words in text for words in _ENDED):
        return (
            "The connection to another process is lost: it has ended. Its own line has the reason, "
            "unless it was killed."
        )
    if any(words in text for words in _SILENT):
        return (
            "Another process did not answer in time (--training_args.ddp_timeout, in seconds): it "
            "hangs, or its machine is not reachable."
        )
    return None


def disconnect() -> None:
    """End the process group at the end of a command."""
    global _ranks
    if _ranks is not ALONE:
        import torch.distributed as dist

        _ranks = ALONE
        dist.destroy_process_group()
