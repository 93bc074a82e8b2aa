"""Launches of the kernels: five operations over lists of tensors.

No operation waits for the device; results stay there. docs/kernels.md lists the bytes of each pass.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.devices import upload
from molf.core.execute.triton import elementwise
from molf.core.execute.triton.items import AdamW, LowRank, Moments
from molf.core.execute.triton.low_rank import low_rank_kernel
from molf.core.execute.triton.table import Entry, Field, Layout, Table
from molf.core.options import KERNEL_TERMS
from molf.core.step.operations import FactorWrite, Operand
from molf.core.storage.rounding import RoundingKey

_BLOCK = 2048  # elements of one program
_TILE = (64, 64)  # of a weight, for one program of a low-rank write
_TILE_INNER = 32  # of its product, at a time
_LANES = 256

_FLOAT32 = (torch.float32,)
_WEIGHT = Field("weight", (torch.float32, torch.bfloat16))
_LOW = Field("low", (torch.int16,))
_GRADIENT = Field("gradient", (torch.float32, torch.bfloat16))
_MOMENTS = (Field("exp_avg", _FLOAT32), Field("exp_avg_sq", _FLOAT32))
_OPERANDS = (
    Field("left", _FLOAT32, is_elementwise=False),
    Field("right", _FLOAT32, is_elementwise=False),
)
_OUTPUTS = (Field("first output", _FLOAT32), Field("second output", _FLOAT32))

_SQUARES = Layout((_GRADIENT,), (1, _BLOCK))
_MOVE_MOMENTS = Layout((_GRADIENT, *_MOMENTS), (1, _BLOCK))
_ADAMW = Layout((_WEIGHT, _LOW, *_MOMENTS, _GRADIENT), (1, _BLOCK))
_FACTORS = Layout((Field("factor", _FLOAT32), *_MOMENTS, *_OUTPUTS), (1, _BLOCK))
_LOW_RANK = Layout((_WEIGHT, _LOW, *_MOMENTS, *_OPERANDS), _TILE)

_Words = tuple[list[float], tuple[int, int]]
_Group = tuple[tuple[Any, ...], list[Entry], list[_Words]]


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return not isinstance(elementwise.moments_kernel, triton.JITFunction)


class Kernels:
    """Kernels on one device.

    A launch reads a table with the addresses and sizes of its tensors. Tables are cached and
    rebuilt when a tensor has moved. Scalars are sent with every launch. Empty tensors and empty
    lists are allowed.

    Every operation that writes takes `finite`, a 0-dim bool tensor on the device. If it is False,
    nothing is written: the state keeps every bit.

    Args:
        device: A CUDA device; under Triton's interpreter the CPU.

    Raises:
        ValueError: The device cannot run the kernels.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != ("cpu" if is_interpreted() else "cuda"):
            allowed = "a CUDA device"
            if is_interpreted():
                allowed = "the CPU, as Triton's interpreter is on"
            raise ValueError(f"Invalid device {device} for the fused kernels. Must be {allowed}.")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._tables: dict[Hashable, tuple[Hashable, Table]] = {}

    def squares(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum the squares of each tensor, float32 or bfloat16.

        Returns:
            One sum per tensor, float64 [n]: in float32 within a block of 2,048 elements, in float64
            over blocks. Infinite or NaN if an element is, or if a square overflows.
        """
        totals = torch.zeros(len(tensors), dtype=torch.float64, device=self.device)
        items = ((_bits(one), Entry((one,), slot), _words()) for slot, one in enumerate(tensors))
        for (bits, aligned), entries, _ in _grouped(items, _SQUARES):
            table = self._table("squares", (bits, aligned), entries, _SQUARES)
            partials = self._partials(table)
            self._launch(
                elementwise.squares_kernel,
                table.grid,
                (table.rows, table.blocks, partials),
                {"BITS": bits, "ALIGNED": aligned, "BLOCK": _BLOCK},
            )
            self._add_up(table, partials, totals)
        return totals

    def moments(
        self, items: Sequence[Moments], finite: Tensor, term: str, *, part: int = 0
    ) -> Tensor:
        """Update m and v in place and sum a score's term over the updated moments.

        Args:
            items: Moments and gradients.
            finite: 0-dim bool; if False nothing is updated and sums are 0.
            term: `"descent"`: `m^2 / (sqrt(v) + 1e-8)`; `"norm"`: `(m / (sqrt(v) + 1e-8))^2`.
            part: Number of the call within a step; each call keeps its own table.

        Returns:
            One sum per item, float64 [n]: in float32 within a block of 2,048 elements, in float64
            over blocks, always in the same order.

        Raises:
            ValueError: The term is unknown, or a tensor does not fit `Moments`.
        """
        self._check_flag(finite)
        if term not in KERNEL_TERMS:
            allowed = " or ".join(map(repr, KERNEL_TERMS))
            raise ValueError(f"Invalid term={term!r}. Must be {allowed}.")
        totals = torch.zeros(len(items), dtype=torch.float64, device=self.device)
        given = (
            (_bits(item.grad), Entry(item[:3], slot), _words(betas=item.betas))
            for slot, item in enumerate(items)
        )
        for (bits, aligned), entries, words in _grouped(given, _MOVE_MOMENTS):
            table = self._table("moments", (bits, aligned), entries, _MOVE_MOMENTS, part)
            partials = self._partials(table)
            self._launch(
                elementwise.moments_kernel,
                table.grid,
                (table.rows, self._send(words), table.blocks, finite, partials),
                {"GRAD_BITS": bits, "TERM": term, "ALIGNED": aligned, "BLOCK": _BLOCK},
            )
            self._add_up(table, partials, totals)
        return totals

    def adamw(self, items: Sequence[AdamW], finite: Tensor) -> None:
        """Take plain AdamW steps in place; update moments in the same pass if `grad` is given.

        Raises:
            ValueError: A tensor does not fit `AdamW`.
        """
        self._check_flag(finite)
        given = (
            (
                (0 if item.grad is None else _bits(item.grad)[0], item.weight.rounding),
                Entry(
                    (*item.weight[:2], item.exp_avg, item.exp_avg_sq, item.grad),
                    first_index=item.weight.first_index,
                ),
                _words(betas=item.betas, step=item.step, key=item.weight.key),
            )
            for item in items
        )
        for (bits, rounding, aligned), entries, words in _grouped(given, _ADAMW):
            table = self._table("adamw", (bits, rounding, aligned), entries, _ADAMW)
            self._launch(
                elementwise.adamw_kernel,
                table.grid,
                (table.rows, self._send(words), table.blocks, finite),
                {"GRAD_BITS": bits, "ROUNDING": rounding, "ALIGNED": aligned, "BLOCK": _BLOCK},
            )

    def factors(self, items: Sequence[FactorWrite], finite: Tensor, *, part: int = 0) -> None:
        """Take the AdamW steps of LoRA factors in place and write the operands of products.

        Raises:
            ValueError: A tensor does not fit `FactorWrite`.
        """
        self._check_flag(finite)
        given = (
            (
                (),
                Entry((*item[:3], *(operand.values for operand in item.operands))),
                _words(step=item.step, operands=item.operands),
            )
            for item in items
        )
        for (aligned,), entries, words in _grouped(given, _FACTORS):
            table = self._table("factors", (aligned,), entries, _FACTORS, part)
            self._launch(
                elementwise.factor_kernel,
                table.grid,
                (table.rows, self._send(words), table.blocks, finite),
                {"ALIGNED": aligned, "BLOCK": _BLOCK},
            )

    def low_rank(self, items: Sequence[LowRank], finite: Tensor, *, part: int = 0) -> None:
        """Write routed weights in place: decay, low-rank product, update, one rounding.

        Raises:
            ValueError: A tensor does not fit `LowRank`.
        """
        self._check_flag(finite)
        given = (
            (
                (item.weight.rounding,),
                _low_rank_entry(item),
                _words(
                    step=item.full[2] if item.full else None,
                    alpha=item.product.alpha,
                    key=item.weight.key,
                ),
            )
            for item in items
        )
        for (rounding, aligned), entries, words in _grouped(given, _LOW_RANK):
            table = self._table("low_rank", (rounding, aligned), entries, _LOW_RANK, part)
            self._launch(
                low_rank_kernel,
                table.grid,
                (table.rows, self._send(words), table.blocks, finite),
                {
                    "ROUNDING": rounding,
                    "ALIGNED": aligned,
                    "BLOCK_ROWS": _TILE[0],
                    "BLOCK_COLS": _TILE[1],
                    "BLOCK_INNER": _TILE_INNER,
                },
            )

    def _check_flag(self, finite: Tensor) -> None:
        if finite.dtype != torch.bool or finite.numel() != 1 or finite.device != self.device:
            raise ValueError(
                f"Invalid finite: {finite.numel()} elements of {finite.dtype} on {finite.device}. "
                f"Must be one torch.bool on {self.device}."
            )

    def _table(
        self,
        kernel: str,
        variant: tuple[Any, ...],
        entries: list[Entry],
        layout: Layout,
        part: int = 0,
    ) -> Table:
        """Return the cached table of a launch, rebuilt if a tensor has moved."""
        wanted = tuple(entry.signature() for entry in entries)
        known = self._tables.get((kernel, variant, part))
        if known is None or known[0] != wanted:
            known = wanted, Table(entries, layout, self.device)
            self._tables[kernel, variant, part] = known
        return known[1]

    def _send(self, words: list[_Words]) -> Tensor:
        """Pack scalars and keys as 32-bit words, int32 [entries, 15], on the device."""
        # One tensor for numbers and keys, so that one copy sends both.
        numbers = torch.tensor([given for given, _ in words], dtype=torch.float64, device="cpu")
        keys = torch.tensor([key for _, key in words], dtype=torch.int64, device="cpu")
        packed = torch.cat([numbers.to(torch.float32).view(torch.int32), keys.to(torch.int32)], 1)
        return upload(packed, self.device)

    def _partials(self, table: Table) -> Tensor:
        return torch.empty(table.grid, dtype=torch.float32, device=self.device)

    def _add_up(self, table: Table, partials: Tensor, totals: Tensor) -> None:
        self._launch(
            elementwise.total_kernel,
            len(table.rows),
            (table.rows, partials, totals),
            {"COLUMNS": table.columns, "LANES": _LANES},
        )

    def _launch(
        self, kernel: Any, grid: int, arguments: tuple[Tensor, ...], constants: dict[str, Any]
    ) -> None:
        """Start one kernel on the device's current stream."""
        if not grid:
            return
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                kernel[(grid,)](*arguments, **constants)
        else:
            kernel[(grid,)](*arguments, **constants)


def _grouped(
    items: Iterable[tuple[tuple[Any, ...], Entry, _Words]], layout: Layout
) -> list[_Group]:
    """Group items by launch: one kernel variant, aligned or not."""
    groups: dict[tuple[Any, ...], _Group] = {}
    for variant, entry, words in items:
        key = (*variant, entry.is_aligned(layout))
        _, entries, all_words = groups.setdefault(key, (key, [], []))
        entries.append(entry)
        all_words.append(words)
    return list(groups.values())


def _bits(grad: Tensor) -> tuple[int]:
    """Return the bits of a gradient's elements; the table checks its dtype."""
    return (8 * grad.element_size(),)


def _low_rank_entry(item: LowRank) -> Entry:
    weight, (left, right, _) = item.weight, item.product
    shape = tuple(weight.values.shape)
    product = (*left.shape[:-1], *right.shape[1:]) if left.shape[-1] == right.shape[0] else None
    if shape != product or len(shape) != 2:
        raise ValueError(
            f"Invalid product {tuple(left.shape)} @ {tuple(right.shape)} for a weight of shape "
            f"{shape}. Must be [rows, K] @ [K, cols]."
        )
    moments = (None, None) if item.full is None else item.full[:2]
    return Entry(
        (weight.values, weight.low, *moments, left, right),
        first_index=weight.first_index,
        inner=left.shape[1],
        is_full=item.full is not None,
    )


def _words(
    *,
    betas: tuple[float, float] = (0.0, 0.0),
    step: AdamWStep | None = None,
    operands: Sequence[Operand] = (),
    alpha: float = 1.0,
    key: RoundingKey | None = None,
) -> _Words:
    """Return an entry's scalars in the order of device.py; no step: no decay, no update."""
    numbers = [1 - betas[0], betas[1], 1 - betas[1]]
    if step is None:
        numbers += [1.0, 0.0, 0.0, 1.0, 1.0]
    else:
        numbers += [step.kept, step.decay, step.step_size, 1 / step.correction, step.eps]
    shares = [(operand.old, operand.increment) for operand in operands] or [(0.0, 0.0)] * 2
    numbers += [share for pair in shares for share in pair]
    return [*numbers, alpha], key or (0, 0)
