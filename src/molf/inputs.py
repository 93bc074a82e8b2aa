"""Reading files that a user named: at once, whole, and never from what could go on for ever."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from molf.errors import InputError

DIRECTORY = "a directory"
_KINDS = (
    (stat.S_ISDIR, DIRECTORY),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def special_kind(path: str | Path) -> str | None:
    """What a path is if it is there and no ordinary file, links followed: "a device", and so on.

    A link that leads nowhere is one of these; a path that is not there at all is not.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "a link that leads nowhere" if os.path.islink(path) else None
    except ValueError:  # a null byte
        return None
    return next((kind for test, kind in _KINDS if test(mode)), None)


def check_ordinary(path: str | Path, shown: str) -> None:
    """Refuse what is no ordinary file, without opening it; a path that is not there passes.

    Args:
        path: The file.
        shown: How a message names it, such as `config a.yaml`.

    Raises:
        InputError: It is a directory, a pipe, a socket or a device.
    """
    kind = special_kind(path)
    if kind == DIRECTORY:
        raise InputError(f"{shown} is a directory. Give a file.")
    if kind is not None:
        raise InputError(f"{shown} is {kind}. Give an ordinary file.")


def read_input(path: str | Path, shown: str, *, most: int | None = None) -> bytes:
    """Read a file that the user named.

    Args:
        path: The file.
        shown: How a message names it, such as `config a.yaml`.
        most: The largest number of bytes to read; one more shows that the file is longer. By
            default the machine's memory.

    Returns:
        The bytes, at most `most + 1`.

    Raises:
        InputError: It is no ordinary file, cannot be read, or has more bytes than the machine has
            memory.
    """
    check_ordinary(path, shown)
    try:
        # What was an ordinary file a moment ago may be a pipe now; without this, open() would wait.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise InputError(f"{shown} is no ordinary file any more.")
            if most is not None:
                return file.read(most + 1)
            _check_size(found.st_size, shown)
            return file.read()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a null byte
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{shown} cannot be read: {reason}.") from error


_BINARY = getattr(os, "O_BINARY", 0)  # of Windows


def _check_size(size: int, shown: str) -> None:
    memory = memory_bytes()
    if memory is not None and size > memory:
        raise InputError(
            f"{shown} has {size:,} bytes, and it is read into memory, of which this "
            f"machine has {memory:,}. Give a part of it."
        )


def memory_bytes() -> int | None:
    """The bytes of this machine's memory, free or not; None where the system does not say it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None
