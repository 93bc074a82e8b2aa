"""First and second moments of a tensor, in float32 or in blocks of 8 bits with a scale.

Where there are winners, a step looks at moments twice: `advance` before they are known, `settle`
when they are. In float32, `advance` has moved them and `settle` only shows them. In 8 bits
`advance` leaves the state alone and `settle` moves them again, from the same gradient, and stores
them: so scores and steps are those of float32 moments, and what storing loses is felt in the next
step only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from types import EllipsisType, ModuleType
from typing import Any

import torch
from torch import Tensor

from molf.core import one_pass
from molf.core.adam import (
    MomentDecay,
    cached_blocks,
    compute_dtype,
    real_view,
    row_blocks,
    update_and_score,
    update_moments,
)
from molf.core.names import STATE_DTYPES

_KEYS = ("exp_avg", "exp_avg_sq")
_BLOCK = 256  # numbers that share a scale
_SMALLEST = 4096  # smaller tensors stay float32: together they are nothing

Rows = slice | EllipsisType
Pair = tuple[Tensor, Tensor]


class Moments(ABC):
    """m and v of one tensor for the length of a step.

    Attributes:
        dtype: Of the arithmetic.
        shapes: Of both; one, if all is well.
        multiple: What the first row of every block must be a multiple of.
        is_settled: Whether `advance` alone has stored the moments.
    """

    dtype: torch.dtype
    shapes: set[torch.Size]
    multiple: int = 1

    is_settled: bool

    @abstractmethod
    def load(self, rows: Rows) -> Pair:
        """Return a block of m and v to compute with."""

    @abstractmethod
    def store(self, rows: Rows, moved: Pair) -> None:
        """Keep a block that `load` has returned and that was changed in place."""

    @abstractmethod
    def blocks(self) -> Iterator[Rows]:
        """Yield the blocks in which `advance` is to be called."""

    def advance(self, rows: Rows, grad: Tensor, decay: MomentDecay, score: str) -> Tensor:
        """Move a block of m and v; return the sum of the score's terms, 0-dim."""
        return update_and_score(grad, *self.load(rows), decay, score)

    def settle(
        self, rows: Rows, grad: Tensor, decay: MomentDecay, *, advanced: bool = True
    ) -> Pair:
        """Return the moved block of m and v, and see that it is stored.

        Args:
            rows: The block.
            grad: Its gradient.
            decay: As for `advance`.
            advanced: Whether `advance` came before, as it does where there is something to score.
        """
        moved = self.load(rows)
        if not (advanced and self.is_settled):
            update_moments(grad, *moved, decay)
            self.store(rows, moved)
        return moved


class FloatMoments(Moments):
    """Moments kept as they are computed, in float32 or float64."""

    is_settled = True

    def __init__(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        self.dtype, self.shapes = exp_avg.dtype, {exp_avg.shape, exp_avg_sq.shape}
        self.multiple = one_pass.rows_of_whole_vectors(exp_avg)

    def blocks(self) -> Iterator[Rows]:
        """Blocks for one pass, where it can be one."""
        return cached_blocks(self.exp_avg)

    def load(self, rows: Rows) -> Pair:
        """Views on the state."""
        return self.exp_avg[rows], self.exp_avg_sq[rows]

    def store(self, rows: Rows, moved: Pair) -> None:
        """Nothing: they are the state."""


class EightBitMoments(Moments):
    """Moments kept as torchao's block-scaled 8-bit codes (Dettmers et al., arXiv 2110.02861).

    The state holds codes in the shape of the tensor and one scale for every 256 of them, plain
    tensors both, so that any checkpoint takes them. A second moment that is not zero is never
    stored as zero: beside a first moment that survives, its next step would be divided by eps.
    """

    is_settled = False
    dtype = torch.float32

    def __init__(self, state: dict[str, Any]) -> None:
        self._codes = [state[f"{key}_codes"] for key in _KEYS]
        self._scales = [state[f"{key}_scales"] for key in _KEYS]
        self.shapes = {codes.shape for codes in self._codes}
        self._row = self._codes[0].numel() // len(self._codes[0])
        self.multiple = _BLOCK // math.gcd(_BLOCK, self._row)

    def blocks(self) -> Iterator[Rows]:
        """Blocks of which copies fit the cache."""
        return row_blocks(self._codes[0], multiple=self.multiple)

    def load(self, rows: Rows) -> Pair:
        """The numbers that the codes stand for."""
        exp_avg, exp_avg_sq = (block.dequantize() for block in self._blocks(rows))
        return exp_avg, exp_avg_sq

    def store(self, rows: Rows, moved: Pair) -> None:
        """Round them to codes."""
        for block, values in zip(self._blocks(rows), moved, strict=True):
            _store(block, values)

    def _blocks(self, rows: Rows) -> list[Any]:
        """Both moments' codes and scales of some rows: torchao's tensors on the same memory."""
        assert isinstance(rows, slice), "tensors without a dimension stay float32"
        scales = slice(rows.start * self._row // _BLOCK, rows.stop * self._row // _BLOCK)
        device = self._codes[0].device
        return [
            _torchao().OptimState8bit(codes[rows], scale[scales], _map(signed, device), signed)
            for codes, scale, signed in zip(self._codes, self._scales, (True, False), strict=True)
        ]


def check_state_dtype(state_dtype: str) -> None:
    """Refuse an unknown format, and one whose library is missing.

    Raises:
        ValueError: The format is unknown.
        ImportError: torchao is not installed.
    """
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"Invalid state_dtype={state_dtype!r}. Must be 'float32' or '8bit'.")
    if state_dtype == "8bit":
        _torchao()


def fits_8bit(parameter: Tensor) -> bool:
    """Whether a tensor's moments can be kept in 8 bits, and are large enough to matter."""
    parameter = real_view(parameter)
    count = parameter.numel()
    fits = count >= _SMALLEST and count % _BLOCK == 0 and parameter.is_contiguous()
    return fits and compute_dtype(parameter) == torch.float32


def moment_state(parameter: Tensor, state_dtype: str = "float32") -> dict[str, Any]:
    """State of a tensor that takes AdamW steps: `step`, and both moments, zero."""
    # The counter is a plain int: reading it never waits for a device.
    state: dict[str, Any] = {"step": 0}
    parameter = real_view(parameter)
    for key in _KEYS:
        if state_dtype == "8bit" and fits_8bit(parameter):
            # With scale zero every code stands for zero.
            state[f"{key}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{key}_scales"] = torch.zeros(
                parameter.numel() // _BLOCK, device=parameter.device
            )
        else:
            state[key] = torch.zeros_like(parameter, dtype=compute_dtype(parameter))
    return state


def moments_of(state: dict[str, Any]) -> Moments:
    """Return the moments that a tensor's state holds."""
    if "exp_avg_codes" in state:
        return EightBitMoments(state)
    return FloatMoments(state["exp_avg"], state["exp_avg_sq"])


def _store(block: Any, values: Tensor) -> None:
    """Round values to the nearest codes, after scaling each 256 of them by the largest.

    torchao's own `copy_` goes through a dozen passes over 64-bit indices, meant to be compiled; a
    search among the middles between neighbouring codes' numbers finds the same codes in one.
    """
    scaled = values.view(-1, _BLOCK)
    scale = scaled.abs().amax(-1).clip(1e-12)
    middles = _middles(block.signed, values.device)
    codes = torch.bucketize(scaled / scale[:, None], middles, right=True, out_int32=True)
    if not block.signed:
        codes = torch.maximum(codes, (scaled > 0).to(torch.int32))
    block.codes.copy_(codes.view(values.shape))
    block.scale.copy_(scale)


@cache
def _middles(signed: bool, device: torch.device) -> Tensor:
    numbers = _map(signed, device)
    return numbers[:-1] + (numbers[1:] - numbers[:-1]) * 0.5


@cache
def _torchao() -> ModuleType:
    try:
        from torchao.optim import subclass_8bit
    except ImportError as error:
        raise ImportError(
            "state_dtype='8bit' needs torchao: pip install 'molf[torchao]', or use "
            "state_dtype='float32'."
        ) from error
    return subclass_8bit


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The numbers that codes stand for, before scaling, [256]."""
    return _torchao().OptimState8bit.zeros((_BLOCK,), signed, _BLOCK, device).qmap
