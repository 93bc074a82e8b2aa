"""Check values and read files that a user gave."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from molf.errors import InputError, system_reason
from molf.extras import how_to_install

DIRECTORY = "a directory"
_KINDS = (
    (stat.S_ISDIR, DIRECTORY),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_choice(name: str, value: str | None, allowed: Iterable[str | None]) -> None:
    """Reject a value that an option does not have.

    Args:
        name: The option.
        value: The given value.
        allowed: The values of the option; None if it may be left out.

    Raises:
        InputError: The value is not one of them.
    """
    if value not in (allowed := tuple(allowed)):
        choices = ", ".join(filter(None, allowed))
        raise InputError(f"Invalid {name}={value!r}. Must be one of {choices}.")


def is_number(value: object, kinds: Any = (int, float)) -> bool:
    """Return whether a value is a finite number; an integer too large for a float is none.

    Args:
        value: The value; a boolean is no number.
        kinds: The types of numbers.
    """
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


def is_integer(value: object) -> bool:
    """Return whether a value is an integer; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def reading_yaml() -> Iterator[None]:
    """Convert each error of PyYAML's safe loader to a ValueError of one line.

    Besides its own errors it raises that of a conversion, such as a KeyError for `!!bool maybe`, an
    AttributeError for `!!timestamp soon` and an OverflowError for an escape above Unicode.

    Raises:
        ValueError: The text is no YAML.
    """
    import yaml

    try:
        yield
    except (LookupError, AttributeError, OverflowError) as error:
        raise ValueError("no YAML: a value cannot be converted") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"no YAML{place}: {problem}") from error


def check_installed(library: str, purpose: str) -> None:
    """Check that an optional library is installed, without importing it.

    Args:
        library: Its name.
        purpose: Subject of the message.

    Raises:
        InputError: It is not installed; the message names the extra.
    """
    if find_spec(library) is None:
        raise InputError(
            f"{purpose} needs {library}, which is not installed: {how_to_install(library)}."
        )


def special_kind(path: str | Path) -> str | None:
    """Return the kind of a path that is no ordinary file, such as "a device"; otherwise None.

    Links are followed. A broken link is a kind; a missing path is None.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "a link that leads nowhere" if os.path.islink(path) else None
    except ValueError:  # a null byte
        return None
    return next((kind for test, kind in _KINDS if test(mode)), None)


def check_ordinary(path: str | Path, shown: str) -> None:
    """Reject a directory, pipe, socket or device without opening it; a missing path passes.

    Args:
        path: The file.
        shown: Its name in the message, such as `config a.yaml`.

    Raises:
        InputError: It is a directory, a pipe, a socket or a device.
    """
    kind = special_kind(path)
    if kind == DIRECTORY:
        raise InputError(f"{shown} is a directory. Give a file.")
    if kind is not None:
        raise InputError(f"{shown} is {kind}. Give an ordinary file.")


def read_text(path: str | Path, shown: str, *, most: int | None = None) -> str:
    """Read a UTF-8 file that the user named; the arguments and errors are those of `read_input`.

    Raises:
        InputError: It is not UTF-8, or longer than `most` bytes.
    """
    content = read_input(path, shown, most=most)
    if most is not None and len(content) > most:
        raise InputError(f"{shown} is longer than {most:,} bytes.")
    return as_text(content, shown)


def as_text(content: bytes, shown: str, start: int = 0) -> str:
    """Decode UTF-8; at the start of a file, with or without a byte order mark.

    Args:
        content: The file, or a part that begins and ends with whole characters.
        shown: The file's name in the message.
        start: Place of the part in the file, in bytes.

    Raises:
        InputError: It is not UTF-8.
    """
    try:
        # Spreadsheets and Windows editors add a BOM.
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text (byte {start + error.start}).") from error


def read_input(path: str | Path, shown: str, *, most: int | None = None) -> bytes:
    """Read a file that the user named.

    Args:
        path: The file.
        shown: Its name in the message, such as `config a.yaml`.
        most: The largest number of bytes to read; by default the machine's memory.

    Returns:
        The bytes; `most + 1` of them if the file is longer than `most`.

    Raises:
        InputError: It is no ordinary file, cannot be read, or is larger than the memory.
    """
    with open_input(path, shown) as file:
        if most is None:
            _check_size(os.fstat(file.fileno()).st_size, shown)
        return file.read(-1 if most is None else most + 1)


def open_input(path: str | Path, shown: str) -> BinaryIO:
    """Open a file that the user named.

    Args:
        path: The file.
        shown: Its name in messages, such as `config a.yaml`.

    Returns:
        The file, whose reads raise `InputError` as well.

    Raises:
        InputError: It is no ordinary file, or cannot be read.
    """
    check_ordinary(path, shown)
    try:
        # O_NONBLOCK: the file may have been replaced by a pipe since the check, and opening a pipe
        # would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except (OSError, ValueError) as error:  # a null byte
        raise _unreadable(shown, error) from error
    file = _InputFile(descriptor, shown)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise InputError(f"{shown} is no ordinary file any more.")
    return io.BufferedReader(file)


class _InputFile(io.FileIO):
    """A file whose errors of reading name it."""

    def __init__(self, descriptor: int, shown: str) -> None:
        super().__init__(descriptor)
        self._shown = shown

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            raise _unreadable(self._shown, error) from error

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            raise _unreadable(self._shown, error) from error


def _unreadable(shown: str, error: Exception) -> InputError:
    return InputError(f"{shown} cannot be read: {system_reason(error)}.")


_BINARY = getattr(os, "O_BINARY", 0)  # Windows only


def _check_size(size: int, shown: str) -> None:
    memory = memory_bytes()
    if memory is not None and size > memory:
        raise InputError(
            f"{shown} has {size:,} bytes and is read into memory, but this machine has only "
            f"{memory:,} bytes of memory. Give a part of it."
        )


def memory_bytes() -> int | None:
    """Return the machine's total memory in bytes, or None where the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None
