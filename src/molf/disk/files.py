"""Write files and directories atomically: to a temporary path beside them, then renamed.

Secrets are masked, and control characters escaped.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from molf.disk.locks import Lock, is_abandoned
from molf.masking import mask, mask_given, mask_text
from molf.shown import json_text, printable

_UNFINISHED = re.compile(r"\.(?P<name>.+)\.\d+\.tmp(?P<replaced>\.replaced)?")
_numbers = itertools.count()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield an empty temporary file; it replaces `path` when the block succeeds.

    If the block fails, the temporary file is deleted and an earlier file at `path` is unchanged.
    Leftovers of killed processes are deleted first.
    """
    with _temporary(path, lambda made: made.touch(exist_ok=False)) as temporary:
        yield temporary
        flush(temporary)  # else a crash could leave the renamed file without its content
        temporary.replace(path)


def flush(path: Path) -> None:
    """Flush a file, or the files in a directory, to the disk.

    Raises:
        OSError: The write fails; some systems report a full disk or quota only here.
    """
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as written:
                # A file opened for reading is flushed as well.
                os.fsync(written.fileno())
        elif file.is_dir():
            flush_directory(file)


def flush_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk, so that a rename in it outlives a power loss.

    Raises:
        OSError: The write fails.
    """
    if sys.platform == "win32":  # has no such call
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system without it
            raise
    finally:
        os.close(descriptor)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory; it replaces `path` when the block succeeds.

    On failure, also on an interrupt between the two renames, an earlier directory at `path` is
    unchanged. Leftovers of killed processes are deleted first.
    """
    with _temporary(path, Path.mkdir) as temporary:
        replaced = path.with_name(f"{temporary.name}.replaced")
        try:
            yield temporary
            flush(temporary)  # else a crash could leave renamed files without their content
            flush_directory(temporary)
            if path.exists():  # renaming over a directory fails, so the old one is renamed first
                path.rename(replaced)
            temporary.rename(path)
        finally:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            _delete(replaced)


@contextmanager
def making_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`, for this user only; it is deleted after the block.

    Leftovers of killed processes are deleted first.
    """
    with _temporary(path, lambda made: made.mkdir(0o700)) as temporary:
        yield temporary


@contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """Yield a directory in the system's temporary folder; it is deleted after the block."""
    with making_directory(Path(tempfile.gettempdir()) / f"molf-{purpose}") as directory:
        yield directory


def is_unfinished(name: str) -> bool:
    """Return whether a name is that of a temporary file or directory."""
    return _UNFINISHED.fullmatch(name) is not None


def clear_unfinished(directory: Path, name: str | None = None) -> None:
    """Delete temporary files and directories of killed processes.

    Args:
        directory: The directory to clear.
        name: The file or directory that they were written for; None for all, in a run's directory.
    """
    try:
        entries = list(directory.iterdir())
    except OSError:
        return  # reported by the next write there
    for entry in entries:
        found = _UNFINISHED.fullmatch(entry.name)
        if found is None or name not in (None, found["name"]):
            continue
        if found["replaced"]:
            writing, place = entry.with_suffix(""), entry.with_name(found["name"])
            if writing.exists() and not is_abandoned(writing):
                continue
            if not place.exists():  # the process died between its two renames
                with suppress(OSError):
                    entry.rename(place)
                continue
        if is_abandoned(entry):
            _delete(entry)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a locked temporary file or directory beside `path`; delete it after the block."""
    clear_unfinished(path.parent, path.name)
    temporary, lock = _make_locked(path, make)
    with lock:
        try:
            yield temporary
        finally:
            _delete(temporary)


def _delete(path: Path) -> None:
    """Delete a file or directory as far as possible."""
    # Errors are ignored: another process may have deleted it, and leftovers are deleted later.
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _make_locked(path: Path, make: Callable[[Path], None]) -> tuple[Path, Lock]:
    """Create a temporary file or directory beside `path`, and lock it."""
    # The lock shows other processes that it is still being written.
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{next(_numbers):03d}.tmp")
        try:
            make(temporary)
        # Another process with this number in another container.
        except FileExistsError:
            continue
        # Before it is locked, another process may take it for a leftover and delete it.
        with suppress(FileNotFoundError):
            lock = Lock(temporary)
            if lock.is_at(temporary):
                return temporary, lock
            lock.release()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with secrets masked and control characters escaped."""
    _write(path, mask_text(text))


def write_first(path: Path, text: str) -> None:
    """Write a text file atomically, unless another process was first: its file is unchanged."""
    with _temporary(path, lambda made: made.touch(exist_ok=False)) as temporary:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        try:
            os.link(temporary, path)  # fails if there is a file, also on network file systems
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically, with secrets masked."""
    _write(path, json_text(mask(value), indent=2) + "\n")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write data records as a JSONL file atomically; only secrets of this process are masked."""
    # Other masking would change texts, which are compared with the data again.
    _write(path, "".join(json_text(record) + "\n" for record in mask_given(records)))


def write_yaml(path: Path, value: Any) -> None:
    """Write a YAML file atomically, keys in the given order, with secrets masked."""
    masked = mask(value)
    text = yaml.safe_dump(masked, sort_keys=False, allow_unicode=True, width=100)
    if printable(text) != text:  # use YAML's own escapes, which keep the values
        text = yaml.safe_dump(masked, sort_keys=False, width=100)
    _write(path, text)


def _write(path: Path, text: str) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")
