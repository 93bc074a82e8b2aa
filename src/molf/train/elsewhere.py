"""Trained weights that their place cannot take: kept in another, and read back there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from molf.train.files import flush
from molf.train.room import free_bytes


def keep_elsewhere(
    write: Callable[[Path], None], name: str, size: int, given: Iterable[Path]
) -> Path | None:
    """Write into a new directory in the first place that takes it.

    Args:
        write: Writes into a directory that is there, and checks what it has written.
        name: The beginning of the directory's name.
        size: About how many bytes will be written.
        given: Places to try first.

    Returns:
        The directory; None if no place took it.
    """
    for place in places(given):
        free = free_bytes(place)
        if free is not None and free < size:
            continue
        try:
            directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
        except OSError:
            continue
        try:
            write(directory)
            flush(directory)
        except Exception:  # whatever it is, the next place may take it
            shutil.rmtree(directory, ignore_errors=True)
            continue
        return directory
    return None


def places(given: Iterable[Path]) -> Iterator[Path]:
    """Directories that are there, in the order in which they are tried; each once.

    Args:
        given: Places to try first.
    """
    usual = (_temporary(), Path("/var/tmp"), Path(os.path.expanduser("~")), _current())
    # The last is memory: it is gone when the machine restarts, but it is often large.
    seen: set[str] = set()
    for place in (*given, *usual, Path("/dev/shm")):
        if place is None or not os.path.isdir(place):  # unlike Path's own, it raises nothing
            continue
        real = os.path.realpath(place)
        if real not in seen:
            seen.add(real)
            yield place


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # none can be written
        return None


def _current() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


def check_written(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read tensors back and compare them, bit by bit.

    Args:
        directory: Where they were written, in safetensors files.
        tensors: The tensors by their names in the files.

    Raises:
        OSError: One is not there, or differs.
    """
    found = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                read = file.get_tensor(name)
                if name in tensors and not _same_bits(read, tensors[name]):
                    raise OSError(f"{path}: {name} is not as it was written")
                found.add(name)
    missing = tensors.keys() - found
    if missing:
        raise OSError(f"{directory} lacks {len(missing)} tensors, the first is {min(missing)}")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bytes(one), as_bytes(other))
