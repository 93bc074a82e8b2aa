"""Wrap standard output and error, which may break: closed terminal, full disk, closed pipe.

Progress and warnings stop printing at the first error, and the work continues. The output of a
command raises `OutputError`.
"""

from __future__ import annotations

import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

from molf.shown import LACKING


class OutputError(OSError):
    """Raised when standard output cannot be written."""


class _Stream(ABC):
    """A wrapper of a text stream, or of None; escapes characters that its encoding lacks."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        # rich and warnings ignore the length, so it is returned even where nothing was written.
        self._try(lambda stream: _write(stream, text))
        return len(text)

    def flush(self) -> None:
        """Flush the wrapped stream."""
        self._try(lambda stream: stream.flush())

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(OSError, ValueError):  # closed
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # not yet set while a copy is made: avoids endless recursion
            raise AttributeError(name)
        return getattr(self._stream, name)

    @abstractmethod
    def _try(self, act: Any) -> None:
        """Call `act` with the stream; the subclass handles its errors."""


class BestEffort(_Stream):
    """A stream that stops printing at its first error, such as a broken pipe.

    Attributes:
        error: The first error; None before it.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(stream)
        self.error: Exception | None = None

    def _try(self, act: Any) -> None:
        if self.error is not None or self._stream is None:
            return
        try:
            act(self._stream)
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.error = error


class Output(_Stream):
    """Standard output that raises `OutputError`; a closed pipe stays a `BrokenPipeError`.

    Attributes:
        is_stopped: Whether an error was handled; nothing is written from then on.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self.is_stopped = False

    def _try(self, act: Any) -> None:
        if self.is_stopped:
            return
        try:
            act(self._stream)
        except (BrokenPipeError, OutputError):
            raise
        except (OSError, ValueError) as error:
            raise OutputError(getattr(error, "strerror", None) or str(error)) from error


def best_effort(stream: IO[str] | None) -> TextIO:
    """Return the stream wrapped so that it stops printing at its first error."""
    return cast(TextIO, stream if isinstance(stream, BestEffort) else BestEffort(stream))


@contextmanager
def ignoring_print_errors() -> Iterator[list[Exception]]:
    """Ignore print errors in the block, including those of libraries.

    Yields:
        A list that holds, after the block, the error of standard error, if there was one.
    """
    before = sys.stdout, sys.stderr
    errors: list[Exception] = []
    sys.stdout, sys.stderr = output, error = best_effort(sys.stdout), best_effort(sys.stderr)
    try:
        yield errors
    finally:
        # A library may have replaced it meanwhile.
        if sys.stdout is output:
            sys.stdout = before[0]
        if sys.stderr is error:
            sys.stderr = before[1]
        fault = cast(BestEffort, error).error
        if fault is not None:
            errors.append(fault)


@contextmanager
def result_on_disk(done: str) -> Iterator[None]:
    """Warn instead of failing where standard output breaks, as the result is on disk as well.

    Args:
        done: The finished work and its place, as the beginning of the warning.
    """
    try:
        yield
        sys.stdout.flush()
    except OutputError as error:
        stop_output()
        warnings.warn(f"{done}, but standard output cannot be written: {error}.", stacklevel=3)


def stop_output() -> None:
    """Write no more to standard output, after its error was handled."""
    if isinstance(sys.stdout, Output):
        sys.stdout.is_stopped = True


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make standard output an `Output` and standard error `BestEffort` for the block."""
    # Open descriptors that the process was started without. Otherwise the next opened file would
    # get number 2, and receive all that libraries write to standard error.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number; writing fails, as before
    before = sys.stdout, sys.stderr
    output = sys.stdout if sys.stdout is not None else os.fdopen(1, "w", closefd=False)
    sys.stdout, sys.stderr = cast(TextIO, Output(output)), best_effort(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in (output, sys.stderr):
            _flush_or_discard(stream)


def _flush_or_discard(stream: TextIO | None) -> None:
    # Python flushes both streams again at exit, and a failure there would set the exit code.
    # Therefore a broken stream is redirected to the null device.
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            if (descriptor := stream.fileno()) in (1, 2):  # the process's own, not a replacement
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _write(stream: IO[str], text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, LACKING).decode(encoding))
