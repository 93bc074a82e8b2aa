"""Storage of the first and second moments of a tensor: float32, or 8-bit codes with scales.

A step with winners uses the moments twice: `advance` updates them and sums score terms, `settle`
returns them for the write. Float moments are updated in place by `advance`. 8-bit moments are
updated in both, from the same gradient, and stored by `settle`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from molf.core.arithmetic import one_pass
from molf.core.arithmetic.adam import (
    MomentDecay,
    Terms,
    compute_dtype,
    real_view,
    update_and_score,
    update_moments,
)
from molf.core.arithmetic.blocks import Blocks, Rows
from molf.core.options import check_word, missing_library
from molf.core.storage.place import WHOLE, Place
from molf.core.warn import warn

_KEYS = ("exp_avg", "exp_avg_sq")
_BLOCK = 256  # most numbers that share a scale
_SMALLEST_BLOCK = 64  # with fewer, scales would weigh more than 1/16 of the codes
_SMALLEST = 4096  # smaller tensors stay float32: their sum is negligible

Pair = tuple[Tensor, Tensor]


class Moments(ABC):
    """m and v of one tensor, for one step.

    Attributes:
        dtype: Dtype of the arithmetic.
        shapes: Shapes of m and v; one element if they agree.
        multiple: The first row of every block must be a multiple of this.
        is_settled: Whether `advance` stores the updated moments.
    """

    dtype: torch.dtype
    shapes: set[torch.Size]
    multiple: int = 1

    is_settled: bool

    @abstractmethod
    def load(self, rows: Rows) -> Pair:
        """Return a block of m and v in `dtype`."""

    @abstractmethod
    def store(self, rows: Rows, moved: Pair) -> None:
        """Store a block that `load` returned and that was changed in place."""

    @abstractmethod
    def blocks(self, blocks: Blocks) -> Iterator[Rows]:
        """Yield the blocks for `advance`."""

    def advance(self, rows: Rows, grad: Tensor, decay: MomentDecay, terms: Terms) -> list[Tensor]:
        """Update a block of m and v; return the sum of each term, 0-dim."""
        return update_and_score(grad, *self.load(rows), decay, terms)

    def settle(
        self, rows: Rows, grad: Tensor, decay: MomentDecay, *, advanced: bool = True
    ) -> Pair:
        """Return the updated block of m and v; store it if `advance` has not.

        Args:
            rows: Rows of the block.
            grad: Gradient of the block.
            decay: As in `advance`.
            advanced: Whether `advance` has run in this step; it runs for routed layers only.
        """
        moved = self.load(rows)
        if not (advanced and self.is_settled):
            update_moments(grad, *moved, decay)
            self.store(rows, moved)
        return moved


class FloatMoments(Moments):
    """Moments in the dtype of the arithmetic, float32 or float64."""

    is_settled = True

    def __init__(self, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self.exp_avg, self.exp_avg_sq = exp_avg, exp_avg_sq
        self.dtype, self.shapes = exp_avg.dtype, {exp_avg.shape, exp_avg_sq.shape}
        self.multiple = one_pass.rows_of_whole_vectors(exp_avg)

    def blocks(self, blocks: Blocks) -> Iterator[Rows]:
        """Yield blocks for the one-pass kernel."""
        return blocks.cached(self.exp_avg)

    def load(self, rows: Rows) -> Pair:
        """Return views of the state."""
        return self.exp_avg[rows], self.exp_avg_sq[rows]

    def store(self, rows: Rows, moved: Pair) -> None:
        """Do nothing: `load` returned views of the state."""


class EightBitMoments(Moments):
    """Moments as torchao's block-scaled 8-bit codes (Dettmers et al., arXiv 2110.02861).

    The state holds codes in the shape of the tensor, uint8, and scales [rows, row length / block],
    float32. Both are plain tensors, which any checkpoint format stores.
    """

    # Not settled by `advance`: the winners are not known then, and a bad step must not change the
    # state. `settle` computes them again from the same gradient, so scores and steps use moments
    # before rounding.

    is_settled = False
    dtype = torch.float32

    def __init__(self, state: dict[str, Any]) -> None:
        self._codes = [state[f"{key}_codes"] for key in _KEYS]
        self._scales = [state[f"{key}_scales"] for key in _KEYS]
        self.shapes = {codes.shape for codes in self._codes}
        self.multiple = one_pass.rows_of_whole_vectors(self._codes[0])

    def blocks(self, blocks: Blocks) -> Iterator[Rows]:
        """Yield blocks whose float32 copies fit the cache."""
        return blocks.of(self._codes[0], multiple=self.multiple)

    def load(self, rows: Rows) -> Pair:
        """Return the dequantised moments, float32."""
        exp_avg, exp_avg_sq = (block.dequantize() for block in self._blocks(rows))
        return exp_avg, exp_avg_sq

    def store(self, rows: Rows, moved: Pair) -> None:
        """Round to codes."""
        for block, values in zip(self._blocks(rows), moved, strict=True):
            _store(block, values)

    def _blocks(self, rows: Rows) -> list[Any]:
        """Return some rows of m and v as torchao tensors on the same memory."""
        return [
            _as_torchao(codes[rows], scales[rows], is_signed)
            for codes, scales, is_signed in zip(
                self._codes, self._scales, (True, False), strict=True
            )
        ]


def _as_torchao(codes: Tensor, scales: Tensor, is_signed: bool) -> Any:
    """Return a torchao tensor on this memory: codes [rows, ...], one scale per block in order."""
    qmap = _map(is_signed, codes.device)
    return _torchao().OptimState8bit(codes, scales.reshape(-1), qmap, is_signed)


def check_state_dtype(state_dtype: str) -> None:
    """Refuse an unknown storage of moments, and "8bit" without torchao.

    Raises:
        ValueError: The word is unknown.
        ImportError: torchao is not installed.
    """
    check_word("state_dtype", state_dtype)
    if state_dtype == "8bit":
        _torchao()


def warn_without_8bit(parameters: Iterable[Tensor]) -> None:
    """Warn if none of these parameters can have 8-bit moments."""
    if not any(map(block_of_8bit, parameters)):
        warn(
            "state_dtype='8bit' changes nothing: no trained tensor has 4,096 or more elements "
            "in rows that blocks of 64 to 256 divide (LoRA factors are never 8-bit)."
        )


def block_of_8bit(parameter: Tensor, place: Place = WHOLE) -> int | None:
    """Return the block length of 8-bit moments; None: the moments stay float32.

    It is the largest divisor of the row length in 64 ... 256 (192 for gemma-3-1b's 1152, 224 for
    Qwen2.5-0.5B's 896). Tensors of one dimension or below 4,096 elements stay float32.
    """
    # Blocks divide a row, so that shards of rows have the blocks of the whole tensor.
    parameter = real_view(parameter)
    # torchao reads the codes in memory order.
    if parameter.dim() < 2 or not parameter.is_contiguous():
        return None
    if place.count(parameter) < _SMALLEST or compute_dtype(parameter) != torch.float32:
        return None
    row = parameter.shape[1:].numel()  # a shard may have no rows
    return next((size for size in range(_BLOCK, _SMALLEST_BLOCK - 1, -1) if row % size == 0), None)


def moment_state(
    parameter: Tensor, state_dtype: str = "float32", place: Place = WHOLE
) -> dict[str, Any]:
    """Return the initial state of a tensor: `step` 0 and zero moments."""
    # Tensors and Python numbers only, which `torch.load(weights_only=True)` and distributed
    # checkpoints load. `step` is an int: reading it never waits for a device.
    state: dict[str, Any] = {"step": 0}
    parameter = real_view(parameter)
    block = block_of_8bit(parameter, place) if state_dtype == "8bit" else None
    for key in _KEYS:
        if block is None:
            state[key] = torch.zeros_like(parameter, dtype=compute_dtype(parameter))
            continue
        # Scale 0: every code means zero.
        shape = len(parameter), parameter.shape[1:].numel() // block
        scales = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
        state[f"{key}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
        state[f"{key}_scales"] = scales
    return state


def in_present_layout(state: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state with 8-bit moments in the present layout.

    Older states have scales [elements / 256], of blocks that may cross rows. If 256 divides the
    row length, the scales are reshaped. Otherwise the moments are rounded again, to blocks that
    divide a row. Tensors of one dimension get float32 moments.
    """
    if "exp_avg_codes" not in state or state["exp_avg_scales"].dim() == 2:
        return state
    changed = dict(state)
    for key, is_signed in zip(_KEYS, (True, False), strict=True):
        codes, scales = changed.pop(f"{key}_codes"), changed.pop(f"{key}_scales")
        if codes.dim() >= 2 and codes[0].numel() % _BLOCK == 0:
            changed[f"{key}_codes"], changed[f"{key}_scales"] = codes, scales.view(len(codes), -1)
            continue
        values = _as_torchao(codes, scales, is_signed).dequantize()
        block = block_of_8bit(values)
        if block is None:
            changed[key] = values
            continue
        scales = scales.new_zeros(len(codes), codes[0].numel() // block)
        codes = torch.empty_like(codes)
        _store(_as_torchao(codes, scales, is_signed), values)
        changed[f"{key}_codes"], changed[f"{key}_scales"] = codes, scales
    return changed


def moments_of(state: dict[str, Any]) -> Moments:
    """Return the moments that a tensor's state holds."""
    if "exp_avg_codes" in state:
        return EightBitMoments(state)
    return FloatMoments(state["exp_avg"], state["exp_avg_sq"])


def _store(block: Any, values: Tensor) -> None:
    """Scale each block by its largest magnitude; round to the nearest codes."""
    # torchao's own `copy_` takes a dozen passes over 64-bit indices and is meant to be compiled.
    # A search among the midpoints of neighbouring codes finds the same codes in one pass.
    scaled = values.view(block.scale.numel(), -1)
    # The bound of torchao: a block of zeros must not divide by zero.
    scale = scaled.abs().amax(-1).clip(1e-12)
    middles = _middles(block.signed, values.device)
    codes = torch.bucketize(scaled / scale[:, None], middles, right=True, out_int32=True)
    if not block.signed:
        # A second moment above zero is never stored as zero: the next update would divide by eps.
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
        raise missing_library("state_dtype", "8bit") from error
    return subclass_8bit


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """Return the values of the codes before scaling, [256]."""
    return _torchao().OptimState8bit.zeros((_BLOCK,), signed, _BLOCK, device).qmap
