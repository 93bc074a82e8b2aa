"""How one block of a weight changes in a step: decay, a product of low rank, AdamW's descent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.adam import AdamWStep
from molf.core.blocks import BLOCKS, Blocks, Rows


class Product(NamedTuple):
    """`alpha left @ right`, of low rank, to be added to a weight.

    Attributes:
        left: [out, k].
        right: [k, in].
        alpha: A number.
    """

    left: Tensor
    right: Tensor
    alpha: float

    def stored_as(self, *, transposed: bool) -> Product:
        """Return it for a weight that is stored as [in, out] if `transposed`; nothing is copied."""
        return Product(self.right.t(), self.left.t(), self.alpha) if transposed else self

    def rows(self, rows: Rows, *, transposed: bool) -> Product:
        """Return the part for some rows of the stored tensor, which may be [in, out]."""
        if transposed:
            return self._replace(right=self.right[:, rows])
        return self._replace(left=self.left[rows])

    def to(self, dtype: torch.dtype) -> Product:
        """Return it in another dtype."""
        return Product(self.left.to(dtype), self.right.to(dtype), self.alpha)

    @property
    def nbytes(self) -> int:
        """Bytes of both operands."""
        return self.left.nbytes + self.right.nbytes


def apply_step(
    values: Tensor,
    moments: Sequence[Tensor],
    step: AdamWStep | None,
    product: Product | None = None,
    *,
    transposed: bool = False,
    scale: float = 1.0,
    blocks: Blocks = BLOCKS,
) -> None:
    """`p <- kept p + product - AdamW's descent` in place, on one block.

    Args:
        values: `scale * p`; float32, or float64.
        moments: m and v of the block, updated already, in the dtype of `values`.
        step: The AdamW step; None: neither decay nor descent.
        product: Of this block's rows, in the dtype of `values`.
        transposed: Whether `values` is stored as [in, out].
        scale: How p is stored.
        blocks: Sizes of blocks.
    """
    kept = step.kept if step else 1.0
    if product is not None:
        target = values.t() if transposed else values
        target.addmm_(product.left, product.right, beta=kept, alpha=product.alpha)
    elif kept != 1:
        values.mul_(kept)
    if step:
        step.descend_(values, *moments, scale=scale, blocks=blocks)
