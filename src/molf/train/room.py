"""Room on a disk: how much there is, and whether an error says that there is none."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from molf.errors import InputError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

_LARGEST = 50 * 10**9  # bytes of the largest file that transformers writes for a model
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_ROOM_TEXTS = ("No space left", "quota exceeded", "File too large")  # safetensors has no errno


def existing(path: Path) -> Path:
    """The directory that exists, of a path and those above it."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def free_bytes(path: Path) -> int | None:
    """Bytes that a user may write where a path is, or would be; None if the system does not know.

    Quotas are not part of it: only writing shows them.
    """
    try:
        usage = shutil.disk_usage(existing(path))
    except OSError:
        return None
    if usage.free == 0 and usage.total == 0:  # some network file systems do not count
        return None
    return int(usage.free)


def largest_file() -> int | None:
    """Bytes that a file may have by this process's limit (`ulimit -f`); None without a limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


def is_no_room(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a file's limit is full."""
    if getattr(error, "errno", None) in _NO_ROOM:
        return True
    return any(text.lower() in str(error).lower() for text in _NO_ROOM_TEXTS)


def check_room(path: Path, parts: Mapping[str, int], *, option: str, advice: str) -> None:
    """Refuse a place that is too small for files that are still to be made.

    Args:
        path: Where the files go.
        parts: Bytes by the name of what takes them.
        option: The option and what it needs the room for, the beginning of the message.
        advice: What to do, the end of the message.

    Raises:
        InputError: There is less room than the parts need together.
    """
    total, free = sum(parts.values()), free_bytes(path)
    named = ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items() if size)
    if free is not None and total > free:
        raise InputError(
            f"{option} needs about {megabytes(total)} there ({named}), and {megabytes(free)} are "
            f"free. {advice}"
        )


def require_room(path: Path, size: int) -> None:
    """Fail as writing would, before anything is written.

    Raises:
        OSError: Where a path would be there is less room than this.
    """
    free = free_bytes(path)
    if free is not None and free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def check_file_size(path: Path, size: int) -> None:
    """Refuse weights in files that are larger than this process may write.

    Args:
        path: Where the files go.
        size: Bytes of the weights.

    Raises:
        InputError: They are; the message names the limit.
    """
    limit = largest_file()
    size = min(size, _LARGEST)
    if limit is not None and size > limit:
        raise InputError(
            f"output_dir {path}: a file of {megabytes(size)} will be written, and this process may "
            f"write files of {megabytes(limit)}. Raise the limit: ulimit -f unlimited."
        )


def megabytes(size: float) -> str:
    """A size for people."""
    if 0 < size < 1e5:
        return f"{size / 1e3:,.0f} kB"
    return f"{size / 1e6:,.1f} MB" if 0 < size < 1e7 else f"{size / 1e6:,.0f} MB"


def directory_bytes(path: Path) -> int:
    """Bytes that the files in a directory take, in whole blocks where the system counts these."""
    found = [entry.stat() for entry in path.rglob("*") if entry.is_file()]
    return sum(max(file.st_size, getattr(file, "st_blocks", 0) * 512) for file in found)
