"""Save trained weights in another directory if the intended one fails, and verify them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from molf.disk.files import flush
from molf.disk.room import free_bytes


def keep_elsewhere(
    write: Callable[[Path], None], name: str, size: int, given: Iterable[Path]
) -> Path | None:
    """Write into a new directory in the first place where that succeeds.

    Args:
        write: Writes into an existing directory, and verifies the result.
        name: The beginning of the directory's name.
        size: The estimated bytes.
        given: Places to try first.

    Returns:
        The directory; None if all places failed.
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
        except Exception:  # of any type: the next place may work
            shutil.rmtree(directory, ignore_errors=True)
            continue
        return directory
    return None


def places(given: Iterable[Path]) -> Iterator[Path]:
    """Yield existing directories to try, each once.

    Args:
        given: Places to try first.
    """
    usual = (_temporary(), Path("/var/tmp"), Path(os.path.expanduser("~")), _current())
    # /dev/shm comes last: it is memory, often large, but lost when the machine restarts.
    seen: set[str] = set()
    for place in (*given, *usual, Path("/dev/shm")):
        if place is None or not os.path.isdir(place):  # Path.is_dir may raise an error
            continue
        real = os.path.realpath(place)
        if real not in seen:
            seen.add(real)
            yield place


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # no temporary directory can be written
        return None


def _current() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


def check_written(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read tensors back and compare them bit by bit.

    Args:
        directory: The directory of the safetensors files.
        tensors: The tensors by their names in the files.

    Raises:
        OSError: One is missing or differs.
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
