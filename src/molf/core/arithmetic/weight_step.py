"""Update of one block of a weight: decay, low-rank product, AdamW update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.blocks import BLOCKS, Blocks, Rows


class Product(NamedTuple):
    """Low-rank product `alpha left @ right` that is added to a weight.

    Attributes:
        left: [out, k].
        right: [k, in].
        alpha: Python number.
    """

    left: Tensor
    right: Tensor
    alpha: float

    def stored_as(self, *, transposed: bool) -> Product:
        """Return the product for a weight that is stored as [in, out] if `transposed`; no copy."""
        return Product(self.right.t(), self.left.t(), self.alpha) if transposed else self

    def rows(self, rows: Rows, *, transposed: bool) -> Product:
        """Return the part for some rows of the stored tensor, [in, out] if `transposed`."""
        if transposed:
            return self._replace(right=self.right[:, rows])
        return self._replace(left=self.left[rows])

    def to(self, dtype: torch.dtype) -> Product:
        """Return the product in another dtype."""
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
    """Update `p <- (1 - lr wd) p + product - AdamW update` in place, on one block.

    Args:
        values: `scale * p`, [rows, ...], float32 or float64.
        moments: Updated m and v of the block, in the shape and dtype of `values`.
        step: AdamW scalars. None: no decay, no update.
        product: Product for this block's rows, in the dtype of `values`.
        transposed: Whether `values` is stored as [in, out].
        scale: `values` holds `scale` times p.
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
