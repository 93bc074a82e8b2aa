"""The checkpoints of a training in one directory: complete or absent, and never all deleted."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from molf.checkpoint.manifest import (
    DamagedError,
    check_hashes,
    hash_files,
    read_manifest,
    write_manifest,
)
from molf.disk.files import clear_unfinished, flush_directory, replacing_directory
from molf.ranks import ALONE, Ranks

VALUES = "values.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_numbers = itertools.count()


def write_checkpoint(
    path: Path, step: int, write: Callable[[Path], None], ranks: Ranks = ALONE
) -> int:
    """Write a checkpoint beside its path, flush it to the disk, and rename it.

    A process that is killed at any moment leaves the whole checkpoint, or none of it.

    Args:
        path: The checkpoint; one of this name is replaced.
        step: Number of completed optimizer steps.
        write: Writes all files but the manifest into a directory; each process its own.
        ranks: Processes that write the checkpoint on a disk that they share, and all call this.

    Returns:
        Bytes of its files.

    Raises:
        OSError: The disk is full or cannot be written; nothing is left. Of several processes, all
            raise it.
    """
    with ExitStack() as stack:

        def begin() -> Path:
            path.parent.mkdir(exist_ok=True)
            return stack.enter_context(replacing_directory(path))

        def finish() -> int:
            files = hash_files(temporary)
            write_manifest(temporary, step, files)
            stack.close()
            # The rename itself; the files were flushed before it.
            flush_directory(path.parent)
            return sum(file["bytes"] for file in files.values())

        temporary = ranks.on_main(begin)
        ranks.everywhere(lambda: write(temporary))
        return ranks.on_main(finish)


def read_values(checkpoint: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint; small tensors among them are on the CPU.

    Raises:
        DamagedError: They cannot be read.
    """
    try:
        values: dict[str, Any] = torch.load(
            checkpoint / VALUES, map_location="cpu", weights_only=True
        )
    except Exception as error:
        raise DamagedError(f"{VALUES} cannot be read: {error}") from error
    return values


def complete_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return step and path of the checkpoints whose files have the right sizes, oldest first."""
    found = []
    for path in _all(directory):
        with suppress(DamagedError):
            found.append((read_manifest(path)["step"], path))
    return sorted(found)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest checkpoint whose hashes are right; None if there is none.

    Leftovers of killed processes are deleted first.

    Warns:
        UserWarning: A newer one is damaged, and not used.
    """
    clear_unfinished(directory)
    for path in sorted(_all(directory), key=_step_of, reverse=True):
        try:
            check_hashes(path)
        except DamagedError as error:
            warnings.warn(
                f"The checkpoint {path} is damaged and is not used: {error}.", stacklevel=2
            )
        else:
            return path
    return None


def delete_old(directory: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Delete complete checkpoints, so that the newest remain; damaged ones do not count.

    Args:
        directory: The directory of the checkpoints.
        keep: How many remain, at least 1.
        spared: Steps whose checkpoints remain as well.
    """
    found = [path for step, path in complete_checkpoints(directory) if step not in spared]
    for path in found[:-keep]:
        delete_checkpoint(path)


def delete_all(directory: Path) -> None:
    """Delete all checkpoints, damaged ones included."""
    for path in _all(directory):
        delete_checkpoint(path)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a process that is killed meanwhile leaves no part under its name."""
    # A name of a temporary file, which `clear_unfinished` deletes.
    aside = path.with_name(f".{path.name}.{os.getpid()}{next(_numbers):03d}.tmp")
    with suppress(FileNotFoundError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _all(directory: Path) -> list[Path]:
    try:
        entries = list(directory.iterdir())
    except OSError:
        return []
    return [path for path in entries if _NAME.fullmatch(path.name) and path.is_dir()]


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1
