"""Records from standard input (`--data -`)."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from molf.errors import InputError, reason_of
from molf.ranks import launched_count

STDIN = "-"
SHOWN = "standard input"

# The first bytes of a content, and the end of the name that it is kept under.
_KINDS = (
    (b"\x1f\x8b", ".jsonl.gz"),
    (b"\x28\xb5\x2f\xfd", ".jsonl.zst"),
    (b"PAR1", ".parquet"),
)


@cache
def stdin_copy() -> Path:
    """Return a temporary file with the content of standard input, which is read once per process.

    The copy can be read again and hashed. It is deleted when the process ends.

    Raises:
        InputError: Standard input is a terminal, closed, or empty; the copy cannot be written; or
            several processes train together.
    """
    if launched_count() > 1:
        raise InputError("data: - is the standard input of one process. Give a file to several.")
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise InputError("data: - reads standard input, which is a terminal. Pipe records into it.")
    incoming = sys.stdin.buffer
    first = incoming.read(4)
    if not first:
        raise InputError(f"{SHOWN} is empty: it holds no records.")
    suffix = next((name for start, name in _KINDS if first.startswith(start)), ".jsonl")
    try:
        descriptor, name = tempfile.mkstemp(prefix="molf-stdin-", suffix=suffix)
        atexit.register(_remove, name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(first)
            shutil.copyfileobj(incoming, file)
    except OSError as error:
        raise InputError(f"{SHOWN} cannot be kept: {reason_of(error)}.") from error
    return Path(name)


def is_stdin_copy(path: Path) -> bool:
    """Return whether a path is that of the copy."""
    return stdin_copy.cache_info().currsize > 0 and path == stdin_copy()


def _remove(name: str) -> None:
    with suppress(OSError):
        os.remove(name)
