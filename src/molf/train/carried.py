"""Stored tensors that the model has no place for, and that its checkpoint keeps all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_EXTRA = "model-carried.safetensors"


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

    def describe(self) -> str | None:
        """One line for people; None if there are no tensors."""
        if not self._files:
            return None
        return (
            f"Carried into the trained model unchanged: {len(self._files)} stored tensors that "
            f"transformers does not load (first: {self.names[0]})."
        )

    def add_to(self, directory: Path) -> None:
        """Add the tensors to a checkpoint that transformers has just written, in its own form.

        One file stays one file; beside several files there is one more, which the index names.
        """
        if not self._files:
            return
        single, index = directory / SAFE_WEIGHTS_NAME, directory / SAFE_WEIGHTS_INDEX_NAME
        if not index.is_file():
            with safe_open(single, "pt") as file:
                written = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                metadata = file.metadata()
                whole = directory / f"{SAFE_WEIGHTS_NAME}.whole"
                save_file({**dict(self._tensors()), **written}, whole, metadata)
                del written
            whole.replace(single)
            return
        record = json.loads(index.read_text(encoding="utf-8"))
        added = {n: t for n, t in self._tensors() if n not in record["weight_map"]}
        save_file(added, directory / _EXTRA, {"format": "pt"})
        record["weight_map"] |= dict.fromkeys(added, _EXTRA)
        sizes = record.setdefault("metadata", {})
        for key, size in (
            ("total_size", sum(t.numel() * t.element_size() for t in added.values())),
            ("total_parameters", sum(t.numel() for t in added.values())),
        ):
            if key in sizes:
                sizes[key] += size
        index.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self.names:
            yield name, self._open[self._files[name]].get_tensor(name)
