"""Where the tensors of a unit are: which part of the whole this process has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """The tensors are whole and in this process.

    Nothing else asks whether a tensor is whole: counts of elements, indices within the whole, and
    sums over all elements come from here.
    """

    def count(self, tensor: Tensor) -> int:
        """Elements of the whole tensor."""
        return tensor.numel()

    def rows(self, tensor: Tensor) -> int:
        """Rows of the whole tensor; 1 of a 0-dim tensor."""
        return tensor.shape[0] if tensor.dim() else 1

    def first_row(self, tensor: Tensor) -> int:
        """Index in the whole tensor of this process's first row."""
        return 0

    def sum(self, numbers: Tensor) -> Tensor:
        """Sums over whole tensors, from sums over the parts that this process has, [n]."""
        return numbers


WHOLE = Place()
