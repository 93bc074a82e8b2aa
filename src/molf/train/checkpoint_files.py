"""The tensors of a checkpoint as its files have them: names, types, shapes, and the numbers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"

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
        file: The file.
        dtype: Its type; None for one that torch has no name for here.
        shape: Its shape.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint's files, read on demand.

    Attributes:
        name: The directory, or the Hub id of a checkpoint that was downloaded.
    """

    name: str
    _open: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor by its name in the files, from their headers; empty if there are none."""
        found = {}
        for path in self._weights():
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype())
                    found[name] = StoredTensor(path, dtype, tuple(part.get_shape()))
        return found

    @cached_property
    def main_dtype(self) -> torch.dtype | None:
        """The floating type of 16 bits or more that most numbers have; None if none has."""
        sizes: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype is not None and is_real(tensor.dtype):
                sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None

    @property
    def generation_config(self) -> bytes | None:
        """The generation configuration's file, as it is; None if there is none."""
        path = self._file(GENERATION_CONFIG)
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
            self._open[path] = safe_open(path, "pt").__enter__()
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def _weights(self) -> list[Path]:
        whole = self._file(WEIGHTS)
        if whole is not None:
            return [whole]
        index = self._file(INDEX)
        if index is None:
            return []
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [path for name in sorted(set(files)) if (path := self._file(name)) is not None]

    def _file(self, name: str) -> Path | None:
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            path = folder / name
            return path if path.is_file() else None
        cached = try_to_load_from_cache(self.name, name)
        return Path(cached) if isinstance(cached, str) else None


def is_real(dtype: torch.dtype) -> bool:
    """Whether a type holds weights as they are, and not the codes of quantised ones."""
    return dtype.is_floating_point and dtype.itemsize >= 2
