"""Stored tensors that transformers does not load; they are copied into the trained checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


class UnusedTensors:
    """Tensors that are copied from the base's files into the trained checkpoint unchanged.

    Args:
        files: The file of each tensor, by the tensor's name.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        # Kept open, so that the tensors can be read if the base is moved or deleted meanwhile.
        self._open: dict[Path, Any] = {
            path: safe_open(path, "pt") for path in sorted(set(files.values()))
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(sorted(self._files))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors on disk, from the headers."""
        return sum(self._nbytes(name) for name in self.names)

    def describe(self) -> str | None:
        """Return one line for the user; None if there are no tensors."""
        if not self._files:
            return None
        return (
            f"Copied into the trained model unchanged: {len(self._files)} stored tensors that "
            f"transformers does not load (first: {self.names[0]})."
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read the tensors, by their names in the files."""
        return {name: self._open[self._files[name]].get_tensor(name) for name in self.names}

    def _nbytes(self, name: str) -> int:
        part = self._open[self._files[name]].get_slice(name)
        bits = "".join(filter(str.isdigit, part.get_dtype().partition("_")[0]))  # F8_E4M3 -> 8
        return prod(part.get_shape()) * (int(bits) // 8 if bits else 1)
