"""A file of lines that a run appends to, and that a full disk does not end the run by."""

from __future__ import annotations

import os
import warnings
from pathlib import Path


class LogFile:
    """Appends lines to a file. Those that cannot be written wait for the next line.

    Args:
        path: The file; made with the first line.

    Warns:
        UserWarning: A line could not be written; once for each time that writing begins to fail.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._fails = False

    def add(self, line: str) -> None:
        """Append a line, after those that wait."""
        self._waiting.append(f"{line}\n")
        try:
            self._append("".join(self._waiting).encode())
        except OSError as error:
            if not self._fails:
                self._fails = True
                warnings.warn(
                    f"{self._path} cannot be written: {error.strerror or error}. Training goes on, "
                    "and its lines wait until it can.",
                    stacklevel=2,
                )
        else:
            self._fails = False
            self._waiting.clear()

    def _append(self, text: bytes) -> None:
        """Append all of a text or nothing."""
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            try:
                written = 0
                while written < len(text):
                    written += os.write(file, text[written:])
            except OSError:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
