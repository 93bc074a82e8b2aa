"""A log file whose write errors, such as a full disk, do not end the run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from molf.disk.files import flush


class LogFile:
    """Appends lines to a file. Lines that cannot be written are kept and retried with the next.

    Args:
        path: The file, or a function that returns it; created with the first line.

    Warns:
        UserWarning: A line could not be written; once per series of failures.
    """

    def __init__(self, path: Path | Callable[[], Path]) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._fails = False

    def add(self, line: str) -> None:
        """Append a line, after those that could not be written before."""
        self._waiting.append(f"{line}\n")
        try:
            self._write()
        except OSError as error:
            if not self._fails:
                self._fails = True
                warnings.warn(
                    f"{self.path} cannot be written: {error.strerror or error}. Training goes on, "
                    "and its lines wait until it can.",
                    stacklevel=2,
                )

    @property
    def path(self) -> Path:
        """The path of the file now."""
        return self._path() if callable(self._path) else self._path

    def position(self) -> int:
        """Flush all lines to the disk; return the size of the file in bytes.

        Raises:
            OSError: Lines cannot be written.
        """
        self._write()
        path = self.path
        if not path.exists():
            return 0
        flush(path)
        return path.stat().st_size

    def rewind(self, position: int) -> None:
        """Cut the file to a size that `position` returned.

        Raises:
            OSError: It cannot be written.

        Warns:
            UserWarning: The file is shorter.
        """
        path = self.path
        size = path.stat().st_size if path.exists() else 0
        if size > position:
            os.truncate(path, position)
        elif size < position:
            warnings.warn(
                f"{path} has {size} of {position} bytes: lines before this part are missing.",
                stacklevel=2,
            )

    def _write(self) -> None:
        if self._waiting:
            _append(self.path, "".join(self._waiting).encode())
        self._fails = False
        self._waiting.clear()


def _append(path: Path, text: bytes) -> None:
    """Append the whole text or nothing."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            written = 0
            while written < len(text):
                written += os.write(file, text[written:])
        except OSError:
            # Else the next try would append to half a line.
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
