"""Standard output and standard error that may break: a closed terminal, a full disk, a closed pipe.

Progress and warnings are an aside: at the first error they fall silent, and the work goes on.
What a command was asked to print is not: an error there is an `OutputError`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast

from molf.shown import LACKING


class OutputError(OSError):
    """Standard output cannot be written."""


class _Stream:
    """A text stream around another, or around none.

    Characters that the encoding lacks are spelled out.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._try(lambda stream: _write(stream, text))
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._try(lambda stream: stream.flush())

    def writelines(self, lines: Any) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(OSError, ValueError):  # closed
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # while it is copied
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _try(self, act: Any) -> None:
        raise NotImplementedError


class Silenced(_Stream):
    """A stream that falls silent at its first error.

    Attributes:
        error: What silenced it; None while it speaks.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(stream)
        self.error: Exception | None = None

    def _try(self, act: Any) -> None:
        if self.error is not None or self._stream is None:
            return
        try:
            act(self._stream)
        except (OSError, ValueError) as error:  # the latter: closed by somebody
            self.error = error


class Output(_Stream):
    """Standard output whose errors bear their name, but for a reader that has gone.

    Attributes:
        is_given_up: Whether an error has been dealt with, so that there are no more.
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self.is_given_up = False

    def _try(self, act: Any) -> None:
        if self.is_given_up:
            return
        try:
            act(self._stream)
        except (BrokenPipeError, OutputError):
            raise
        except (OSError, ValueError) as error:
            raise OutputError(getattr(error, "strerror", None) or str(error)) from error


def silenced(stream: IO[str] | None) -> TextIO:
    """The stream, silent from its first error on."""
    return cast(TextIO, stream if isinstance(stream, Silenced) else Silenced(stream))


@contextmanager
def console_that_may_break() -> Iterator[list[Exception]]:
    """Have nothing in the block fail because it, or a library, cannot print.

    Yields:
        After the block, why standard error fell silent; empty if it did not.
    """
    before = sys.stdout, sys.stderr
    errors: list[Exception] = []
    sys.stdout, sys.stderr = output, error = silenced(sys.stdout), silenced(sys.stderr)
    try:
        yield errors
    finally:
        if sys.stdout is output:
            sys.stdout = before[0]
        if sys.stderr is error:
            sys.stderr = before[1]
        fault = cast(Silenced, error).error
        if fault is not None:
            errors.append(fault)


@contextmanager
def result_on_disk(done: str) -> Iterator[None]:
    """Print in the block what is in files as well: the command has not failed if that fails.

    Args:
        done: What is complete, and where, as the beginning of a warning.
    """
    try:
        yield
        sys.stdout.flush()
    except OutputError as error:
        give_up_output()
        warnings.warn(f"{done}, but standard output cannot be written: {error}.", stacklevel=3)


def give_up_output() -> None:
    """Have standard output raise no more errors: that it failed has been dealt with."""
    if isinstance(sys.stdout, Output):
        sys.stdout.is_given_up = True


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make standard output an `Output` and standard error `Silenced` for the block.

    Descriptors that the process was started without are opened, so that no file of ours gets their
    numbers, and what a library writes to standard error. At the end of the process Python flushes
    both streams once more, and a failure there would be its exit code: a broken one is led to
    nowhere.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number; writing fails, as before
    before = sys.stdout, sys.stderr
    output = sys.stdout if sys.stdout is not None else os.fdopen(1, "w", closefd=False)
    sys.stdout, sys.stderr = cast(TextIO, Output(output)), silenced(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in (output, sys.stderr):
            _settle(stream)


def _settle(stream: TextIO | None) -> None:
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            if (descriptor := stream.fileno()) in (1, 2):  # the process's own
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def _write(stream: IO[str], text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, LACKING).decode(encoding))
