"""Locks on directories and files: a process holds one while it writes there.

The kernel keeps them (flock) and releases them when the process ends, however it ends. Nothing is
written for it: the lock is on the directory or file itself, goes with it when it is renamed, and
tells whether a path still leads to it. Directories of network file systems are locked against
processes of the same machine alone.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import weakref
from pathlib import Path
from types import TracebackType

if sys.platform != "win32":
    import fcntl

_WAIT = 0.5  # seconds; somebody who only looks (`in_use`) holds a lock for a moment
_PAUSE = 0.02
_LOOK = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a FIFO would wait for its writer
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class InUseError(OSError):
    """Another process, or another part of this one, holds the lock."""


class Lock:
    """A lock on a directory or file that exists, held until `release` or the end of the process.

    File systems without locks are taken as they are: nothing is locked there, `is_at` works.

    Args:
        path: The directory or file.
        shared: Others may hold it as well, if all of them share it.
        wait: Seconds to try for.

    Raises:
        InUseError: It is held elsewhere.
        OSError: There is nothing at `path`, or it cannot be read.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait: float = _WAIT) -> None:
        self._descriptor: int | None = os.open(path, _LOOK)
        _open_locks.add(self)
        try:
            _flock(self._descriptor, shared=shared, until=time.monotonic() + wait)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether it has not been released yet."""
        return self._descriptor is not None

    def release(self) -> None:
        """Let others have it; a second time does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def is_at(self, path: Path) -> bool:
        """Whether a path leads to what is locked: not if that was moved, deleted or replaced."""
        if self._descriptor is None:
            return False
        try:
            there = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # the file system does not answer: whoever writes there will see
            return True
        return os.path.samestat(there, os.fstat(self._descriptor))

    def place(self) -> Path | None:
        """Where what is locked is now; None if it was deleted, or the system cannot say."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        except OSError:
            return None
        return path if self.is_at(path) else None


_open_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    """Close what a forked process inherits: it would hold the lock after its parent's death.

    The parent keeps its lock.
    """
    for lock in _open_locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def in_use(path: Path, *, by_writers: bool = False) -> bool:
    """Whether somebody holds a lock on a directory or file.

    Args:
        path: The directory or file; nothing there is not in use.
        by_writers: Shared locks do not count.
    """
    try:
        Lock(path, shared=by_writers).release()
    except InUseError:
        return True
    except OSError:
        return False
    return False


def is_abandoned(path: Path) -> bool:
    """Whether it is known that nobody holds a lock on a directory or file any more."""
    if sys.platform == "win32":
        return False
    try:
        descriptor = os.open(path, _LOOK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        return False
    finally:
        os.close(descriptor)
    return True


def _flock(descriptor: int, *, shared: bool, until: float) -> None:
    if sys.platform == "win32":
        return
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    while True:
        try:
            fcntl.flock(descriptor, operation)
        except OSError as error:
            if error.errno not in _HELD:
                return  # no locks on this file system
            if time.monotonic() >= until:
                raise InUseError(error.errno, "in use") from error
            time.sleep(_PAUSE)
        else:
            return
