"""Locks on directories and files, held by a process while it writes there.

They are flock locks on the directory or file itself: the kernel releases them when the process
ends, and a rename keeps them. On network file systems they hold only for one machine.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import weakref
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_WAIT = 0.5  # seconds; `in_use` holds a lock for a moment
_PAUSE = 0.02
_LOOK = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for a writer
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class InUseError(OSError):
    """Another process, or another part of this one, holds the lock."""


class Lock:
    """A lock on an existing directory or file, held until `release` or the end of the process.

    On a file system without locks, nothing is locked; `is_at` works.

    Args:
        path: The directory or file.
        shared: Take a shared lock instead of an exclusive one.
        wait: Seconds until giving up.

    Raises:
        InUseError: It is held elsewhere.
        OSError: `path` does not exist or cannot be read.
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

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether the lock is not released yet."""
        return self._descriptor is not None

    def release(self) -> None:
        """Release the lock; a second call is a no-op."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def is_at(self, path: Path) -> bool:
        """Return whether the path is still the locked file, not moved, deleted or replaced."""
        if self._descriptor is None:
            return False
        try:
            there = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # the file system does not answer; reported by the next write
            return True
        return os.path.samestat(there, os.fstat(self._descriptor))

    def place(self) -> Path | None:
        """Return the current path of the locked file; None if deleted or not known."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
        except OSError:
            return None
        return path if self.is_at(path) else None


_open_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    """Close the locks that a forked process inherits; the parent keeps them."""
    # Otherwise the child would hold the lock after its parent has ended.
    for lock in _open_locks:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def in_use(path: Path, *, by_writers: bool = False) -> bool:
    """Return whether a directory or file is locked.

    Args:
        path: The directory or file; False if it does not exist.
        by_writers: Ignore shared locks.
    """
    try:
        Lock(path, shared=by_writers).release()
    except InUseError:
        return True
    except OSError:
        return False
    return False


def is_abandoned(path: Path) -> bool:
    """Return whether a directory or file is known not to be locked any more."""
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
