"""Check free disk space and file size limits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from molf.amounts import decimal_size
from molf.disk.files import making_directory
from molf.errors import InputError, system_reason

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

_LARGEST = 50 * 10**9  # bytes of the largest file that transformers writes for a model
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_ROOM_TEXTS = ("No space left", "quota exceeded", "File too large")  # safetensors has no errno


def nearest_existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def check_writable(place: Path, given: str) -> None:
    """Check that a directory can be written.

    Args:
        place: The directory.
        given: The option and its value, as the beginning of the message.

    Raises:
        InputError: It cannot be written.
    """
    try:
        # Only a write shows it: permissions miss read-only file systems and /proc.
        with making_directory(place / "written"):
            pass
    except OSError as error:
        raise InputError(f"{given} cannot be written: {place}: {system_reason(error)}.") from error


def free_bytes(path: Path) -> int | None:
    """Return the free bytes at a path, which need not exist; None if not known.

    Quotas are not included: they show only in a write.
    """
    try:
        usage = shutil.disk_usage(nearest_existing(path))
    except OSError:
        return None
    if usage.free == 0 and usage.total == 0:  # some network file systems report 0 for both
        return None
    return int(usage.free)


def largest_file() -> int | None:
    """Return this process's limit on file size (`ulimit -f`) in bytes; None without a limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else int(limit)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error means a full disk, an exceeded quota or file size limit."""
    if getattr(error, "errno", None) in _NO_ROOM:
        return True
    return any(text.lower() in str(error).lower() for text in _NO_ROOM_TEXTS)


def check_room(path: Path, parts: Mapping[str, int], *, option: str, advice: str) -> None:
    """Reject a place with too little space for files that will be written.

    Args:
        path: The place of the files.
        parts: Bytes by name.
        option: The option and the purpose of the space, as the beginning of the message.
        advice: Advice, as the end of the message.

    Raises:
        InputError: There is less space than the parts need together.
    """
    total, free = sum(parts.values()), free_bytes(path)
    named = ", ".join(f"{name} {decimal_size(size)}" for name, size in parts.items() if size)
    if free is not None and total > free:
        raise InputError(
            f"{option} needs about {decimal_size(total)} there ({named}), and {decimal_size(free)} "
            f"are free. {advice}"
        )


def require_room(path: Path, size: int) -> None:
    """Raise the error of a full disk before anything is written.

    Raises:
        OSError: There is less space than `size` at the path.
    """
    free = free_bytes(path)
    if free is not None and free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def check_file_size(path: Path, size: int) -> None:
    """Reject weights whose files exceed this process's limit.

    Args:
        path: The place of the files.
        size: Bytes of the weights.

    Raises:
        InputError: A file would exceed the limit, which the message names.
    """
    limit = largest_file()
    # transformers splits larger models into several files.
    size = min(size, _LARGEST)
    if limit is not None and size > limit:
        raise InputError(
            f"output_dir {path}: a file of {decimal_size(size)} will be written, and this process "
            f"may write files of {decimal_size(limit)}. Raise the limit: ulimit -f unlimited."
        )


def directory_bytes(path: Path) -> int:
    """Return the disk space of the files in a directory, in whole blocks if these are known."""
    # Small files take whole blocks, sparse ones less than their size.
    found = [entry.stat() for entry in path.rglob("*") if entry.is_file()]
    return sum(max(file.st_size, getattr(file, "st_blocks", 0) * 512) for file in found)
