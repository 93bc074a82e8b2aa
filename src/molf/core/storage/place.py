"""Location of a tensor: the whole of it in this process, or some of its rows.

Element counts, indices within the whole tensor and the processes that share it come from here.
Places are given to layers; tensors do not have them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor

from molf.core.storage.collectives import ALONE, Processes


@dataclass(frozen=True)
class Place:
    """A whole tensor in this process.

    Attributes:
        processes: Processes that share the tensor.
    """

    processes: Processes = ALONE

    def rows(self, tensor: Tensor) -> int:
        """Return the number of rows of the whole tensor; 1 for a 0-dim tensor."""
        return tensor.shape[0] if tensor.dim() else 1

    def first_row(self, tensor: Tensor) -> int:
        """Return the index, in the whole tensor, of this process's first row."""
        return 0

    def shape(self, tensor: Tensor) -> Size:
        """Return the shape of the whole tensor."""
        return Size((self.rows(tensor), *tensor.shape[1:])) if tensor.dim() else tensor.shape

    def count(self, tensor: Tensor) -> int:
        """Return the number of elements of the whole tensor."""
        return self.shape(tensor).numel()


WHOLE = Place()


@dataclass(frozen=True)
class RowsPlace(Place):
    """Consecutive rows of a tensor in this process, possibly none; other processes have the rest.

    Attributes:
        whole_rows: Number of rows of the whole tensor.
        start: Index of this process's first row.
    """

    whole_rows: int = 0
    start: int = 0

    def rows(self, tensor: Tensor) -> int:
        """Return the number of rows of the whole tensor."""
        return self.whole_rows

    def first_row(self, tensor: Tensor) -> int:
        """Return the index, in the whole tensor, of this process's first row."""
        return self.start
