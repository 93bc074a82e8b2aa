"""Blocks of rows, in which eager operations go through a large tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from molf.core import one_pass

Rows = slice | EllipsisType
"""Index of a block: rows of the first dimension, or all of a 0-dim tensor."""


@dataclass(frozen=True)
class Blocks:
    """How large a block is.

    On a CPU a block fits the cache, so that a chain of elementwise operations reads and writes main
    memory once. Elsewhere a block bounds the temporaries of very large tensors.

    Attributes:
        cpu_elements: Elements of a block on the CPU, for each thread. torch gives each thread at
            least 65,536 elements; the half dozen tensors of a chain then take 0.8 MB of its cache
            in float32.
        elements: Elements of a block elsewhere: 128 MB in float32.
    """

    cpu_elements: int = 65_536
    elements: int = 1 << 25

    def of(
        self, tensor: Tensor, *, at_least: int = 1, multiple: int = 1, stretch: int = 1
    ) -> Iterator[Rows]:
        """Yield indices of the first dimension that together cover `tensor`.

        Args:
            tensor: Any shape.
            at_least: Fewest rows of a block, where a matrix product needs some to be worth it.
            multiple: The first row of every block is a multiple of this.
            stretch: How many times larger blocks may be, because few tensors share the cache.
        """
        if not tensor.numel():
            return
        if tensor.dim() == 0:
            yield ...
            return
        elements = self.elements
        if tensor.device.type == "cpu":
            elements = self.cpu_elements * torch.get_num_threads()
        rows = tensor.shape[0]
        size = max(at_least, stretch * elements * rows // tensor.numel())
        size = -(-size // multiple) * multiple
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def cached(self, tensor: Tensor) -> Iterator[Rows]:
        """`of` a tensor of which nothing is copied, for work that may be one pass."""
        # One pass is over four tensors: larger blocks of them still fit the cache.
        stretch = 2 if one_pass.fits(tensor) else 1
        # Blocks begin where the kernel's vectors do, so that their size changes no rounding.
        multiple = one_pass.rows_of_whole_vectors(tensor)
        return self.of(tensor, multiple=multiple, stretch=stretch)


BLOCKS = Blocks()
"""The sizes that steps use."""
