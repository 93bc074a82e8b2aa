"""Store the low halves of float32 weights beside a model that was saved in bfloat16.

With them, `molf export RUN --dtype float32` restores the exact float32 weights of the training.
Each tensor has the name and shape of the model's, as int16 (16 of the 32 bits). The file records
the rounding, which determines how the halves are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molf.core.storage.rounding import (
    RoundingKey,
    join_float32,
    join_rounded,
    low_bits,
    round_stochastic,
    split_float32,
)
from molf.disk.files import replacing_file
from molf.errors import InputError


@dataclass(frozen=True)
class Rounding:
    """Rounding of float32 to bfloat16, and its inverse.

    Attributes:
        kind: `"nearest"` (ties away from zero) or `"stochastic"`.
        seed: Seed of the random bits, which also depend on the tensor's name.
    """

    kind: str = "nearest"
    seed: int = 0

    @classmethod
    def chosen(
        cls, kind: str | None, seed: int, base: torch.dtype | None, target: torch.dtype
    ) -> Rounding:
        """Return the requested rounding, or the one that loses less of a training.

        Args:
            kind: The requested rounding, or None.
            seed: Seed of the random bits.
            base: The stored type of the base; None if it is not known.
            target: The type to round to.
        """
        # Weights that started as numbers of the target type return to them under nearest rounding
        # if their updates are small: stochastic. Other weights start anywhere between two numbers
        # of that type, so nearest has no bias and a smaller error.
        is_on_grid = base is not None and torch.promote_types(base, target) == target
        return cls(kind or ("stochastic" if is_on_grid else "nearest"), seed)

    def split(self, values: Tensor, name: str, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return the bfloat16 numbers and the low halves (int16) of float32 numbers.

        Args:
            values: float32 `[n]`, a part of a flattened tensor.
            name: The tensor's name.
            first: Index of the part's first element in the tensor.
        """
        if self.kind == "stochastic":
            return round_stochastic(values, self.key(name), first), low_bits(values)
        return split_float32(values)

    def join(self, high: Tensor, low: Tensor, name: str, first: int = 0) -> Tensor:
        """Return the float32 numbers `[n]` from the two results of `split`."""
        if self.kind == "stochastic":
            return join_rounded(high, low, self.key(name), first)
        return join_float32(high, low)

    def key(self, name: str) -> RoundingKey:
        """Return the key of the random bits for a tensor."""
        return RoundingKey.of(self.seed, f"saved/{name}", 0)


@dataclass(frozen=True)
class LowHalves:
    """The low halves of a model's float32 weights.

    Attributes:
        tensors: int16, by the names in the model's file; tensors stored exactly are left out.
        rounding: The rounding that they belong to.
    """

    tensors: Mapping[str, Tensor]
    rounding: Rounding

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        metadata = {"rounding": self.rounding.kind, "seed": str(self.rounding.seed)}
        # safetensors rejects tensors that are not contiguous.
        with replacing_file(path) as temporary:
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, temporary, metadata)


def read_low_halves(path: Path) -> LowHalves:
    """Read a file of `LowHalves.write`.

    Raises:
        InputError: The file is damaged or of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        rounding = Rounding(metadata["rounding"], int(metadata["seed"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Restore it, or delete it.") from error
    if any(tensor.dtype != torch.int16 for tensor in tensors.values()):
        raise InputError(f"{path} is no file of lower halves: it must hold int16 alone.")
    return LowHalves(tensors, rounding)
