"""The writes of a step as values.

Forms (`folded.py`, `adapter.py`) list them; executors (`eager.py`, `triton/executor.py`) run them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.weight_step import Product
from molf.core.step.dense import DenseTensor
from molf.core.storage.weights import StoredWeight


class TensorWrite(NamedTuple):
    """`p <- (1 - lr wd) p + product - AdamW update`, rounded once; 8-bit moments are stored.

    Attributes:
        tensor: Weight, bias, embedding or norm.
        step: AdamW scalars. None: no decay, no update.
        product: Low-rank product that is added. None: no product.
        transposed: Whether the tensor is stored as [in, out].
    """

    tensor: DenseTensor
    step: AdamWStep | None
    product: Product | None = None
    transposed: bool = False


class Operand(NamedTuple):
    """Slice of a product's operand: `old P + increment dP`, P before the step.

    Attributes:
        values: Output, in the shape of the factor.
        old: Coefficient of the factor P.
        increment: Coefficient of its increment dP.
    """

    values: Tensor
    old: float
    increment: float


class FactorWrite(NamedTuple):
    """`P <- P + dP` for one LoRA factor in the state; also fills two operands of the product.

    Attributes:
        values: A [r, in] or B [out, r] of one expert.
        exp_avg: m, in the same shape.
        exp_avg_sq: v, in the same shape.
        step: AdamW scalars.
        operands: Slices of the product's operands.
    """

    # W_eff changes by `s (dB A' + B dA)`: the product needs P and dP of the same step.
    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: AdamWStep
    operands: tuple[Operand, Operand]


class AdapterSlice(NamedTuple):
    """AdamW step of one expert's slice of an adapter's parameter.

    Attributes:
        where: Index of the slice.
        exp_avg: m of the paper's factor, in the shape of the slice.
        exp_avg_sq: v of the paper's factor, in the shape of the slice.
        step: AdamW scalars.
        scale: The parameter holds `scale` times the factor.
    """

    where: tuple[Any, ...]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: AdamWStep
    scale: float


class AdapterWrite(NamedTuple):
    """AdamW steps of the winners' slices of one adapter parameter."""

    stored: StoredWeight
    slices: Sequence[AdapterSlice]


class LayerWrites(NamedTuple):
    """All writes of one layer."""

    # Run factors first: they fill the operands of the tensors' products.
    factors: Sequence[FactorWrite] = ()
    tensors: Sequence[TensorWrite] = ()
    adapters: Sequence[AdapterWrite] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the products' operands."""
        return sum(write.product.nbytes for write in self.tensors if write.product is not None)
