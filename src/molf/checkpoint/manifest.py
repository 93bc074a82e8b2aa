"""The manifest of a checkpoint: size and SHA-256 of each of its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molf.disk.files import sha256_of
from molf.errors import system_reason

MANIFEST = "manifest.json"
FORMAT = 1
"""Number of the format; a checkpoint of another number is not loaded."""


class DamagedError(Exception):
    """A checkpoint is incomplete or damaged; the message has the file and the reason."""


def hash_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of the files in a directory, by path relative to it."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            found[path.relative_to(directory).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": sha256_of(path),
            }
    return found


def write_manifest(directory: Path, step: int, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of a directory whose files are complete.

    Args:
        directory: The checkpoint.
        step: Number of completed optimizer steps.
        files: The result of `hash_files`; of several processes, their union.
    """
    record = {"format": FORMAT, "step": step, "files": dict(files)}
    (directory / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest, after comparing the sizes of the files.

    Raises:
        DamagedError: The manifest or a file is missing, or a size differs.
    """
    try:
        record = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        known, step, files = record["format"], int(record["step"]), dict(record["files"])
        sizes = {name: int(file["bytes"]) for name, file in files.items()}
        hashes = [str(file["sha256"]) for file in files.values()]
    except FileNotFoundError as error:
        raise DamagedError(f"it has no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error
    if known != FORMAT:
        raise DamagedError(f"its format is {known!r}, and this version of molf reads {FORMAT}")
    for (name, size), _ in zip(sizes.items(), hashes, strict=True):
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{name}: {system_reason(error)}") from error
        if found != size:
            raise DamagedError(f"{name} has {found} of {size} bytes")
    return {"step": step, "files": files}


def check_hashes(directory: Path) -> None:
    """Read all files and compare their hashes with the manifest.

    Raises:
        DamagedError: A file is missing, cannot be read, or has another content.
    """
    for name, file in read_manifest(directory)["files"].items():
        try:
            found = sha256_of(directory / name)
        except OSError as error:
            raise DamagedError(f"{name}: {system_reason(error)}") from error
        if found != file["sha256"]:
            raise DamagedError(f"the content of {name} has changed")
