"""Files that appear whole or not at all: written beside their place, then renamed into it.

What they say is written without secrets and without control characters.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from molf.masking import mask, mask_given, mask_text
from molf.shown import json_text, printable
from molf.train.locks import Lock, is_abandoned

_UNFINISHED = re.compile(r"\.(?P<name>.+)\.\d+\.tmp(?P<replaced>\.replaced)?")
_numbers = itertools.count()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to; it takes its place when the block succeeds.

    When the block fails, what it wrote is removed and an earlier file at `path` is as it was. What
    killed processes have left of the same is removed first.
    """
    clear_unfinished(path.parent, path.name)
    temporary, lock = _made(path, lambda name: name.touch(exist_ok=False))
    with lock:
        try:
            yield temporary
            flush(temporary)  # a rename must not become durable before the bytes
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write a file, or those of a directory, to the disk.

    Raises:
        OSError: It cannot: a disk or a quota may prove full only now.
    """
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; it takes `path`'s place when the block succeeds.

    When anything fails, an interrupt between two renames included, an earlier directory at `path`
    is as it was; it is deleted only after the new one bears its name. What killed processes have
    left of the same is removed.
    """
    clear_unfinished(path.parent, path.name)
    temporary, lock = _made(path, Path.mkdir)
    replaced = path.with_name(f"{temporary.name}.replaced")
    with lock:
        try:
            yield temporary
            flush(temporary)  # a rename must not become durable before the bytes
            if path.exists():  # a directory cannot be renamed over another: the old one steps aside
                path.rename(replaced)
            temporary.rename(path)
        finally:
            if replaced.exists() and not path.exists():
                replaced.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def making_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory of this user's alone beside `path`; it is removed after the block.

    What killed processes have left of the same is removed first.
    """
    clear_unfinished(path.parent, path.name)
    temporary, lock = _made(path, lambda made: made.mkdir(0o700))
    with lock:
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """The same, in the system's place for temporary files; `purpose` is a part of its name."""
    with making_directory(Path(tempfile.gettempdir()) / f"molf-{purpose}") as directory:
        yield directory


def is_unfinished(name: str) -> bool:
    """Whether a file or directory has the name of something that was being written."""
    return _UNFINISHED.fullmatch(name) is not None


def clear_unfinished(directory: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing, as far as nobody writes it any more.

    Args:
        directory: Where they wrote.
        name: What they wrote there; None for anything, where all in the directory is ours.
    """
    try:
        entries = list(directory.iterdir())
    except OSError:
        return  # whoever writes there will see
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
            with suppress(OSError):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _made(path: Path, make: Callable[[Path], None]) -> tuple[Path, Lock]:
    """Make something new beside `path`, locked: others know by it that it is being written."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{next(_numbers):03d}.tmp")
        try:
            make(temporary)
        except FileExistsError:
            continue
        # Another process may take it for abandoned before it is locked.
        with suppress(FileNotFoundError):
            lock = Lock(temporary)
            if lock.is_at(temporary):
                return temporary, lock
            lock.release()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: secrets masked, and control characters spelled out."""
    _write(path, mask_text(text))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole, indented for readers, secrets masked."""
    _write(path, json_text(mask(value), indent=2) + "\n")


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records of data as a JSONL file whole; secrets of this process are masked.

    Texts of data are no one's to change otherwise: they are compared with the data again.
    """
    _write(path, "".join(json_text(record) + "\n" for record in mask_given(records)))


def write_yaml(path: Path, value: Any) -> None:
    """Write a YAML file whole, keys in the order given, secrets masked."""
    masked = mask(value)
    text = yaml.safe_dump(masked, sort_keys=False, allow_unicode=True, width=100)
    if printable(text) != text:  # YAML has escapes of its own, which keep the values
        text = yaml.safe_dump(masked, sort_keys=False, width=100)
    _write(path, text)


def _write(path: Path, text: str) -> None:
    with replacing_file(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")
