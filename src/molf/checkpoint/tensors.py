"""Tensors of a checkpoint by name, in the format of `torch.distributed.checkpoint`.

The format stores each process's part of a tensor with its place in the whole, so that a checkpoint
of some processes loads in any other number of processes. One process needs no process group.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from molf.checkpoint.manifest import DamagedError

TENSORS = "tensors"
_METADATA = ".metadata"
# The metadata are a pickle of these; nothing else of one is run.
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_MODULES = ("torch.distributed.checkpoint.metadata",)
_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    # Paths: their module has another name from Python 3.13 on.
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
}


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Write tensors, one after the other, without a copy of them all.

    Args:
        directory: The checkpoint, on every process the same.
        tensors: Tensors by name, on any device; a `DTensor` is written in parts.
        group: Process group of the processes that write, on the CPU; None for the default one.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    writer = dcp.FileSystemWriter(directory / TENSORS, single_file_per_rank=True, sync_files=True)
    with _one_process():
        try:
            dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=_is_alone())
        except dcp.api.CheckpointException as error:
            raise _cause_of(error) from error


def read_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read tensors into existing ones, in place and one after the other.

    Args:
        directory: The checkpoint.
        tensors: Tensors to write to, by name; those of the checkpoint that are not named are left
            out.

    Raises:
        DamagedError: A tensor is missing or has another shape, or a file cannot be read.
    """
    # Parameters are written through an alias that does not record gradients.
    targets = {name: tensor.detach() for name, tensor in tensors.items()}
    with _one_process():
        try:
            dcp.load(targets, storage_reader=_Reader(directory / TENSORS), no_dist=_is_alone())
        except (dcp.api.CheckpointException, RuntimeError, KeyError) as error:
            cause = _cause_of(error) if isinstance(error, dcp.api.CheckpointException) else error
            raise DamagedError(f"its tensors cannot be loaded: {cause}") from error


def stored_tensors(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the whole shape and the dtype of each stored tensor, by name.

    Raises:
        DamagedError: The metadata cannot be read.
    """
    stored = _Reader(directory / TENSORS).read_metadata().state_dict_metadata
    return {
        name: (item.size, item.properties.dtype)
        for name, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }


class _Reader(dcp.FileSystemReader):
    """A reader whose metadata may hold only what this format needs.

    torch reads them with `pickle.load`, which runs any code that a file names.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata.

        Raises:
            DamagedError: The file cannot be read, or has other objects.
        """
        try:
            with (Path(self.path) / _METADATA).open("rb") as file:
                metadata: Metadata = _Unpickler(file).load()
        except (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
            raise DamagedError(f"{TENSORS}/{_METADATA} cannot be read: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_MODULES) or (module, name) in _NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _is_alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


@contextmanager
def _one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        # One process without a group is meant.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause_of(error: dcp.api.CheckpointException) -> BaseException:
    """Return the error of a process that made a save or load fail, such as a full disk."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
