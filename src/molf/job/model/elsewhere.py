"""Save trained weights in another directory if the intended one fails, and verify them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

from molf.disk.files import flush
from molf.disk.room import free_bytes


def save_elsewhere(
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
        # None (not known) does not exclude a place: the write shows it.
        free = free_bytes(place)
        if free is not None and free < size:
            continue
        try:
            directory = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
        except OSError:
            continue
        try:
            write(directory)
            # A full disk or quota may show only when the system writes its buffers.
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
    candidates = list(map(str, given))
    with suppress(OSError):  # no temporary directory can be written
        candidates.append(tempfile.gettempdir())
    candidates += ["/var/tmp", os.path.expanduser("~")]
    with suppress(OSError):  # the current directory was deleted
        candidates.append(os.getcwd())
    # /dev/shm comes last: it is memory, often large, but lost when the machine restarts.
    candidates.append("/dev/shm")
    # Not Path.is_dir, which raises an error for a directory without permissions.
    directories: dict[str, Path] = {}
    for place in candidates:
        directories.setdefault(os.path.realpath(place), Path(place))
    yield from filter(os.path.isdir, directories.values())


def check_written(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read tensors back and compare them bit by bit.

    Args:
        directory: The directory of the safetensors files.
        tensors: The tensors by their names in the files.

    Raises:
        OSError: One is missing or differs.
    """
    read_back = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                read = file.get_tensor(name)
                if name in tensors and not _same_bits(read, tensors[name]):
                    raise OSError(f"{path}: {name} is not as it was written")
                read_back.add(name)
    missing = tensors.keys() - read_back
    if missing:
        raise OSError(f"{directory} lacks {len(missing)} tensors, the first is {min(missing)}")


def _same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    # As bytes, because NaN is not equal to itself.
    ours, theirs = (
        some.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for some in (tensor, other)
    )
    return torch.equal(ours, theirs)
