"""Blocks of rows in which eager operations process a large tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from molf.core.arithmetic import one_pass

Rows = slice | EllipsisType
"""Index of a block: rows of the first dimension, or all of a 0-dim tensor."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of blocks.

    Attributes:
        cpu_elements: Elements of a block on the CPU, per thread.
        elements: Elements of a block on other devices: 128 MB in float32.
    """

    # On a CPU a block fits the cache, so that a chain of elementwise operations reads and writes
    # main memory once: half a dozen float32 tensors of this size take 1.5 MiB per thread.
    cpu_elements: int = 65_536
    # Elsewhere a block bounds the temporaries of very large tensors.
    elements: int = 1 << 25

    def of(
        self, tensor: Tensor, *, at_least: int = 1, multiple: int = 1, stretch: int = 1
    ) -> Iterator[Rows]:
        """Yield indices of the first dimension that together cover `tensor`.

        Args:
            tensor: Any shape.
            at_least: Fewest rows of a block; products of few rows are slow.
            multiple: The first row of every block is a multiple of this.
            stretch: Factor on the block size, for work that touches few tensors.
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
        """Yield blocks of a tensor for the one-pass kernel, which copies nothing."""
        # One pass touches four tensors, not six: blocks of twice the size still fit the cache.
        stretch = 2 if one_pass.fits(tensor) else 1
        # Blocks start at a vector of the kernel, so that the block size changes no rounding.
        multiple = one_pass.rows_of_whole_vectors(tensor)
        return self.of(tensor, multiple=multiple, stretch=stretch)


BLOCKS = Blocks()
"""Sizes that steps use."""
