"""Location of a unit's tensors: the part of the whole tensor in this process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Whole tensors in this process.

    Element counts, indices within the whole tensor and sums over all elements come from here, so
    that sharding needs a second class and no other change.
    """

    def count(self, tensor: Tensor) -> int:
        """Return the number of elements of the whole tensor."""
        return tensor.numel()

    def rows(self, tensor: Tensor) -> int:
        """Return the number of rows of the whole tensor; 1 for a 0-dim tensor."""
        return tensor.shape[0] if tensor.dim() else 1

    def first_row(self, tensor: Tensor) -> int:
        """Return the index, in the whole tensor, of this process's first row."""
        return 0

    def sum(self, numbers: Tensor) -> Tensor:
        """Return sums over whole tensors, [n], from sums over this process's parts, [n]."""
        return numbers


WHOLE = Place()
