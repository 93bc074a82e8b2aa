"""The writes of a step, as values: a form lists them, an executor runs them.

A step updates moments, makes gradients of LoRA factors, and then writes factors and weights. Forms
(`folded.py`, `adapter.py`) say which tensors take part and how; executors (`eager.py`,
`fused/executor.py`) do the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from molf.core.adam import AdamWStep
from molf.core.dense import DenseTensor
from molf.core.storage import StoredWeight
from molf.core.weight_step import Product


class TensorWrite(NamedTuple):
    """`p <- kept p + product - AdamW's descent`, rounded once; moments are stored.

    Attributes:
        tensor: The weight, bias, embedding or norm.
        step: The AdamW step with its decay; None: neither decay nor descent.
        product: Added to the weight; None: nothing.
        transposed: Whether the tensor is stored as [in, out].
    """

    tensor: DenseTensor
    step: AdamWStep | None
    product: Product | None = None
    transposed: bool = False


class Operand(NamedTuple):
    """A slice of a product's operand: `old P + increment dP`, with P from before the step.

    Attributes:
        values: Written; the factor's shape.
        old: Share of the factor P.
        increment: Share of its increment dP.
    """

    values: Tensor
    old: float
    increment: float


class FactorWrite(NamedTuple):
    """`P <- P + dP` of one expert's LoRA factor in the state, and two operands of the product.

    `W_eff` changes by `s (dB A' + B dA)`, so the product needs P and dP from the same step.

    Attributes:
        values: A or B of one expert.
        exp_avg: Its m.
        exp_avg_sq: Its v.
        step: Its AdamW step.
        operands: Slices of the product's operands.
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: AdamWStep
    operands: tuple[Operand, Operand]


class AdapterSlice(NamedTuple):
    """The part of an adapter's parameter that one expert owns, and its step.

    Attributes:
        where: Index of the slice.
        exp_avg: m of the slice, of the paper's factor.
        exp_avg_sq: v of the slice.
        step: The AdamW step.
        scale: The parameter stores the factor times this.
    """

    where: tuple[Any, ...]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: AdamWStep
    scale: float


class AdapterWrite(NamedTuple):
    """An adapter's parameter of which the winners' slices take their steps."""

    stored: StoredWeight
    slices: Sequence[AdapterSlice]


class LayerWrites(NamedTuple):
    """All writes of one layer: factors first, because the product's operands come from them."""

    factors: Sequence[FactorWrite] = ()
    tensors: Sequence[TensorWrite] = ()
    adapters: Sequence[AdapterWrite] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the operands that wait for the factors."""
        return sum(write.product.nbytes for write in self.tensors if write.product is not None)
