"""Table of tensor addresses, sizes and strides on the device; one launch reads many tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.devices import upload

HEADER = 8  # columns, in the order of device.py
FIELD = 3

_ALIGNMENT = 16  # bytes of an address, and elements in a row, that vector loads need


class Field(NamedTuple):
    """Requirements of a kernel for one of its tensors.

    Attributes:
        name: Name for messages.
        dtypes: Supported dtypes.
        is_elementwise: Whether the tensor has the shape of the entry.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    is_elementwise: bool = True


class Layout(NamedTuple):
    """Requirements of a kernel for an entry, and its block size.

    Attributes:
        fields: Tensors in the order of the kernel's fields.
        block: Rows and columns of one program. One row: contiguous tensors are read as vectors,
            others may have gaps between rows. More rows: a tile of a contiguous matrix.
    """

    fields: tuple[Field, ...]
    block: tuple[int, int]

    @property
    def is_tiled(self) -> bool:
        """Whether a program processes a tile of a matrix."""
        return self.block[0] > 1


class Entry(NamedTuple):
    """One unit of work: tensors and sizes.

    Attributes:
        fields: Tensors in the layout's order; None for fields that the kernel does not read.
        slot: Index of this entry's number in the result.
        first_index: Index of the first element in the whole tensor, for stochastic rounding.
        inner: K of a low-rank product.
        is_full: Whether the write uses moments.
    """

    fields: tuple[Tensor | None, ...]
    slot: int = 0
    first_index: int = 0
    inner: int = 0
    is_full: bool = False

    def signature(self) -> tuple[object, ...]:
        """Return all values that the entry's row depends on, as a key."""
        places = [
            None if field is None else (field.data_ptr(), field.shape, field.stride(), field.dtype)
            for field in self.fields
        ]
        return (*self[1:], *places)

    def elementwise(self, layout: Layout) -> list[Tensor]:
        """Return the tensors that have the shape of the entry."""
        pairs = zip(layout.fields, self.fields, strict=True)
        return [field for what, field in pairs if what.is_elementwise and field is not None]

    def is_aligned(self, layout: Layout) -> bool:
        """Return whether loads can be vectors: contiguous, aligned address and length."""
        tensors = self.elementwise(layout)
        length = tensors[0].shape[-1] if layout.is_tiled else tensors[0].numel()
        return length % _ALIGNMENT == 0 and all(
            tensor.is_contiguous() and tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors
        )

    def check(self, layout: Layout, device: torch.device) -> None:
        """Refuse tensors that a kernel would misread.

        Raises:
            ValueError: For the first unsupported dtype, device, shape or layout.
        """
        shapes = {}
        for what, field in zip(layout.fields, self.fields, strict=True):
            if field is None:
                continue
            if field.dtype not in what.dtypes:
                allowed = " or ".join(map(str, what.dtypes))
                raise ValueError(f"Invalid {what.name} of dtype {field.dtype}. Must be {allowed}.")
            if field.device != device:
                raise ValueError(f"Invalid {what.name} on {field.device}. Must be on {device}.")
            if not what.is_elementwise:
                continue
            shapes[what.name] = tuple(field.shape)
            has_rows = not layout.is_tiled and field.dim() == 2 and field.stride(1) == 1
            if not has_rows and not field.is_contiguous():
                allowed = "contiguous" if layout.is_tiled else "contiguous, or have contiguous rows"
                raise ValueError(
                    f"Invalid {what.name} with strides {field.stride()} for shape "
                    f"{tuple(field.shape)}. Must be {allowed}."
                )
        if len(set(shapes.values())) > 1:
            raise ValueError(f"Invalid shapes {shapes}. Must be one shape.")


class Table:
    """Table of a launch, on the device.

    Args:
        entries: At least one entry.
        layout: Layout of the kernel.
        device: Device of the launch.

    Attributes:
        rows: int64 [entries, columns].
        blocks: int32 [grid], index of the entry of every block.
        grid: Number of blocks.
        columns: Number of columns of a row.
    """

    def __init__(self, entries: Sequence[Entry], layout: Layout, device: torch.device) -> None:
        self.grid = 0
        self.columns = HEADER + FIELD * len(layout.fields)
        rows, counts = [], []
        for entry in entries:
            entry.check(layout, device)
            shape = _shape(entry.elementwise(layout), layout)
            blocks = -(-shape[0] * shape[1] // layout.block[1])
            if layout.is_tiled:
                blocks = -(-shape[0] // layout.block[0]) * -(-shape[1] // layout.block[1])
            row = [entry.slot, self.grid, blocks, *shape]
            row += [entry.first_index, entry.inner, int(entry.is_full)]
            for field in entry.fields:
                row += _place(field)
            rows.append(row)
            counts.append(blocks)
            self.grid += blocks
        self.rows = upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
        # Expanded on the device: the host sends one number per entry, not per block.
        self.blocks = torch.repeat_interleave(
            torch.arange(len(entries), dtype=torch.int32, device=device),
            upload(torch.tensor(counts, dtype=torch.int64, device="cpu"), device),
            output_size=self.grid,
        )


def _shape(tensors: list[Tensor], layout: Layout) -> tuple[int, int]:
    """Return rows and columns; one row if no tensor of a vector kernel has gaps."""
    if not layout.is_tiled and all(tensor.is_contiguous() for tensor in tensors):
        return 1, tensors[0].numel()
    rows, cols = tensors[0].shape
    return rows, cols


def _place(field: Tensor | None) -> list[int]:
    if field is None:
        return [0, 0, 0]
    return [field.data_ptr(), *(field.stride() if field.dim() == 2 else (0, 0))]
