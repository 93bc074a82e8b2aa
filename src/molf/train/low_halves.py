"""The lower halves of weights that were stored in bfloat16, in a file beside the model.

With them `molf export RUN --dtype float32` gives the float32 weights that the training ended with.
A tensor of the file has the name of the model's, its shape, and 16 of the 32 bits (int16). How the
two halves go together depends on the rounding, which the file names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from molf.core.rounding import (
    RoundingKey,
    join_float32,
    join_rounded,
    low_bits,
    round_stochastic,
    split_float32,
)
from molf.errors import InputError
from molf.train.files import replacing_file


@dataclass(frozen=True)
class Rounding:
    """How float32 becomes bfloat16, and back.

    Attributes:
        kind: `"nearest"` (ties away from zero) or `"stochastic"`.
        seed: Of the draws; with the tensor's name it decides each of them.
    """

    kind: str = "nearest"
    seed: int = 0

    @classmethod
    def chosen(
        cls, kind: str | None, seed: int, base: torch.dtype | None, target: torch.dtype
    ) -> Rounding:
        """The rounding that was asked for, or the one that loses less of a training.

        Numbers that began as those of the target type go back to them when they are rounded to the
        nearest, however many small steps they have taken: they are rounded stochastically. Others
        begin anywhere between two of that type, so that nearest has no bias either and errs less.

        Args:
            kind: What was asked for, or None.
            seed: Of the draws.
            base: The type that training began with, as stored; None if it is not known.
            target: What is rounded to.
        """
        is_on_grid = base is not None and torch.promote_types(base, target) == target
        return cls(kind or ("stochastic" if is_on_grid else "nearest"), seed)

    def split(self, values: Tensor, name: str, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return the bfloat16 and the lower half (int16) of float32 numbers.

        Args:
            values: float32, a part of a flattened tensor.
            name: The tensor's name.
            first: Where in the tensor the part begins.
        """
        if self.kind == "stochastic":
            return round_stochastic(values, self.key(name), first), low_bits(values)
        return split_float32(values)

    def join(self, high: Tensor, low: Tensor, name: str, first: int = 0) -> Tensor:
        """Return the float32 numbers that `split` has split."""
        if self.kind == "stochastic":
            return join_rounded(high, low, self.key(name), first)
        return join_float32(high, low)

    def key(self, name: str) -> RoundingKey:
        """What decides the draws for a tensor."""
        return RoundingKey.of(self.seed, f"saved/{name}", 0)


@dataclass(frozen=True)
class LowHalves:
    """What a model's file lacks of float32 weights.

    Attributes:
        tensors: int16, by the names in the model's file; tensors that lost nothing are left out.
        rounding: How the halves came about.
    """

    tensors: Mapping[str, Tensor]
    rounding: Rounding

    def write(self, path: Path) -> None:
        """Write them whole or not at all."""
        metadata = {"rounding": self.rounding.kind, "seed": str(self.rounding.seed)}
        with replacing_file(path) as temporary:
            save_file({n: t.contiguous() for n, t in self.tensors.items()}, temporary, metadata)


def read_low_halves(path: Path) -> LowHalves:
    """Read what `LowHalves.write` has written.

    Raises:
        InputError: The file is not whole, or not one of these.
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
