"""Files that appear whole or not at all: written beside their place, then renamed into it.

What they say is written without secrets and without control characters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from molf.masking import mask, mask_given, mask_text
from molf.shown import json_text, printable


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place when the block succeeds.

    When the block fails, what it wrote is removed and an earlier file at `path` is as it was.
    """
    temporary = _beside(path)
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
    is as it was; it is deleted only after the new one bears its name.
    """
    temporary = _beside(path)
    temporary.mkdir()
    replaced = path.with_name(f"{temporary.name}.replaced")
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


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
