"""Read the stored weights of a checkpoint: files, names, types, shapes and numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from molf.errors import InputError

GENERATION_CONFIG = "generation_config.json"

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        name: Its name there.
        file: The file.
        dtype: Its type; None for a type not in `_DTYPES`.
        shape: Its shape.
    """

    name: str
    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint's files, read on demand.

    Attributes:
        name: The directory, or a Hub id, whose files are downloaded.
        explicit: The weights file in its configuration (`transformers_weights`), if any.
    """

    name: str
    explicit: str | None = None
    _open: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """All tensors by their names in the files, from the headers.

        Raises:
            InputError: There are no safetensors files, or one is missing or cannot be read.
        """
        found: dict[str, StoredTensor] = {}
        for path in _weight_files(self.name, self.explicit):
            found |= _tensors_in(self.name, path)
        return found

    @cached_property
    def main_dtype(self) -> torch.dtype | None:
        """The floating-point type (16 bits or more) of most numbers; None if there is none."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if is_real(tensor.dtype):
                sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None

    @property
    def generation_config(self) -> bytes | None:
        """The bytes of the generation configuration's file; None if there is none."""
        path = _found(self.name, GENERATION_CONFIG)
        return None if path is None else path.read_bytes()

    def find(self, name: str, prefix: str = "") -> str | None:
        """Return the name of a tensor in the files, with or without the base model's prefix."""
        dotted = f"{prefix}."
        for candidate in (name, name.removeprefix(dotted), f"{dotted}{name}"):
            if candidate in self.tensors:
                return candidate
        return None

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        path = self.tensors[name].file
        if path not in self._open:
            # Kept open: a model has hundreds of tensors in one file, and opening parses the header.
            self._open[path] = safe_open(path, "pt").__enter__()
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor


def is_real(dtype: torch.dtype | None) -> TypeGuard[torch.dtype]:
    """Return whether a type is known and holds unquantised weights, not codes of quantised ones."""
    return dtype is not None and dtype.is_floating_point and dtype.itemsize >= 2


def _tensors_in(name: str, path: Path) -> dict[str, StoredTensor]:
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(tensor)
                dtype = _DTYPES.get(part.get_dtype())
                found[tensor] = StoredTensor(tensor, path, dtype, tuple(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"model {name}: {path.name} cannot be read as safetensors (cut short, or of another "
            f"format): {error}"
        ) from error
    return found


def _weight_files(name: str, explicit: str | None) -> list[Path]:
    """Return the files that transformers would load: one, or those of an index."""
    # The order of `from_pretrained`.
    first = SAFE_WEIGHTS_NAME if explicit is None else explicit
    if (single := _found(name, first)) is not None and single.suffix != ".json":
        return [single]
    index = single or _found(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise InputError(f"model {name} has no {first}{_instead(name)}")
    try:
        # An index of another program may have any content.
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = {file: _found(name, file) for file in sorted(names)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"model {name}: {index.name} is no index of weights: {type(error).__name__}: {error}"
        ) from error
    missing = [file for file, path in files.items() if path is None]
    if missing:
        raise InputError(
            f"model {name}: {index.name} names {len(missing)} of {len(files)} files that are not "
            f"there, the first is {missing[0]}. Copy or download them again."
        )
    return [path for path in files.values() if path is not None]


def _found(name: str, file: str) -> Path | None:
    """Return the path of a checkpoint's file, downloaded for a Hub id; None if it is missing."""
    found = cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _instead(name: str) -> str:
    """Return which other weights a directory has instead of safetensors, with advice."""
    path = Path(name)
    files = sorted(path.iterdir()) if path.is_dir() else []
    other = [file.name for file in files if file.suffix in _OTHER_FORMATS]
    if not other:
        return ": there are no weights to load."
    return (
        f", and {other[0]} is not read: files of that kind can run code, or are no weights of "
        "transformers. Convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
    )
