"""Stored tensors that the model has no place for, and that its checkpoint keeps all the same."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class Carried:
    """Tensors of a checkpoint that are written into the trained one as they are stored.

    The files are kept open: a base that is moved or deleted meanwhile can still be read.

    Args:
        files: The file of each tensor, by the tensor's name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        self._open: dict[Path, Any] = {
            path: safe_open(path, "pt") for path in sorted(set(files.values()))
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(sorted(self._files))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors as they are stored; no tensor is read."""
        return sum(self._nbytes(name) for name in self.names)

    def describe(self) -> str | None:
        """One line for people; None if there are no tensors."""
        if not self._files:
            return None
        return (
            f"Carried into the trained model unchanged: {len(self._files)} stored tensors that "
            f"transformers does not load (first: {self.names[0]})."
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read the tensors, by their names in the files."""
        return {name: self._open[self._files[name]].get_tensor(name) for name in self.names}

    def _nbytes(self, name: str) -> int:
        part = self._open[self._files[name]].get_slice(name)
        bits = "".join(filter(str.isdigit, part.get_dtype().partition("_")[0]))  # of F8_E4M3: 8
        return prod(part.get_shape()) * (int(bits) // 8 if bits else 1)
