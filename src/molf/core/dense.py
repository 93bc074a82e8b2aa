"""A dense tensor in a step: its moments move, then its values, and both are stored.

Here, and in the forms for LoRA factors, is all that touches elements of weights and moments; what
would compute the same in fused kernels has its place here.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core.adam import (
    AdamWStep,
    MomentDecay,
    gradient,
    row_blocks,
    sum_dtype,
)
from molf.core.fidelity import UpdateTally
from molf.core.guard import FiniteGuard
from molf.core.moments import moment_state, moments_of
from molf.core.storage import StoredWeight, rounding_of

_PRODUCT_ROWS = 128  # of a weight, for one product: fewer would be slow, more would be temporaries


class Product(NamedTuple):
    """`scale left @ right`, of low rank, to be added to a weight.

    Attributes:
        left: [out, k].
        right: [k, in].
        scale: A factor.
    """

    left: Tensor
    right: Tensor
    scale: float

    def rows(self, rows: slice | EllipsisType, *, transposed: bool) -> Product:
        """Return the part for some rows of the stored tensor, which may be [in, out]."""
        if transposed:
            return self._replace(right=self.right[:, rows])
        return self._replace(left=self.left[rows])

    def to(self, dtype: torch.dtype) -> Product:
        """Return it in another dtype."""
        return Product(self.left.to(dtype), self.right.to(dtype), self.scale)


class DenseTensor:
    """A weight, bias, embedding or norm with a gradient, for the length of one step.

    Attributes:
        parameter: The tensor.
        group: The parameter group that it is in.
        state: Its state; made here if there is none yet.
    """

    def __init__(
        self, parameter: Tensor, group: dict[str, Any], state: dict[str, Any], name: str
    ) -> None:
        self.parameter, self.group, self.state = parameter, group, state
        if "step" not in state:
            state.update(moment_state(parameter, group["state_dtype"]))
        self._stored = StoredWeight(
            parameter,
            state,
            rounding=rounding_of(parameter, group["weight_rounding"]),
            seed=group["seed"],
            name=name,
        )
        self._moments = moments_of(state)
        self._decay: MomentDecay | None = None
        self._advanced = False

    @property
    def stored(self) -> StoredWeight:
        """How the parameter holds its values."""
        return self._stored

    def adamw_step(self, weight_decay: str = "weight_decay") -> AdamWStep:
        """The scalars of the step that the counter says; `weight_decay` names the group's key."""
        group = self.group
        return AdamWStep(
            group["lr"], group[weight_decay], group["betas"], group["eps"], self.state["step"]
        )

    def update_moments(self, guard: FiniteGuard, score: str) -> Tensor:
        """Move the moments; return the sum of the score's terms, 0-dim, on the device."""
        device = self.parameter.device
        self._decay = decay = self._decay_of(guard)
        self._advanced = True
        grad = gradient(self.parameter)
        total = grad.new_zeros((), dtype=sum_dtype(device))
        for rows in row_blocks(self.parameter, multiple=self._moments.multiple):
            total += self._moments.advance(rows, grad[rows], decay, score)
        return total

    def adamw(self, guard: FiniteGuard, tally: UpdateTally | None) -> None:
        """Moments, counter and values at once, of a tensor that is not routed."""
        self._decay = self._decay_of(guard)
        self.state["step"] += 1
        self.move(self.adamw_step(), tally)

    def move(
        self,
        step: AdamWStep | None,
        tally: UpdateTally | None,
        products: Sequence[Product] = (),
        *,
        transposed: bool = False,
    ) -> None:
        """`p <- kept p + products - AdamW's direction`, rounded once; moments are stored.

        Args:
            step: The AdamW step with its decay; None leaves both away.
            tally: Where losses of rounding are counted, if anywhere.
            products: What is added.
            transposed: Whether the tensor is stored as [in, out].
        """
        if step is None and not products and self._moments.is_settled:
            return
        assert self._decay is not None, "moments move first"
        parameter, grad, moments = self.parameter, gradient(self.parameter), self._moments
        at_least = _PRODUCT_ROWS if products else 1
        for rows in row_blocks(parameter, at_least=at_least, multiple=moments.multiple):
            moved = moments.settle(rows, grad[rows], self._decay, advanced=self._advanced)
            if step is None and not products:
                continue
            part = [product.rows(rows, transposed=transposed) for product in products]
            values = self._stored.read(rows)
            if tally is None:
                _move_block(values, moved, step, part, transposed)
                self._stored.write(rows, values)
                continue
            picked, wide = tally.sample(parameter), sum_dtype(values.device)
            before = values[picked].to(wide, copy=True)
            intended = before.clone()
            _move_block(
                intended,
                (moved[0][picked].to(wide), moved[1][picked].to(wide)),
                step,
                [product.rows(picked, transposed=transposed).to(wide) for product in part],
                transposed,
            )
            _move_block(values, moved, step, part, transposed)
            self._stored.write(rows, values)
            after = self._stored.read(rows)[picked].to(wide)
            tally.add(before, intended, after, weight=values.numel() / before.numel())

    def _decay_of(self, guard: FiniteGuard) -> MomentDecay:
        return guard.decay_of(self.parameter.device, self._moments.dtype, self.group["betas"])


def _move_block(
    values: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamWStep | None,
    products: Sequence[Product],
    transposed: bool,
) -> None:
    """Move one block in place."""
    kept = step.kept if step else 1.0
    for left, right, scale in products:
        (values.t() if transposed else values).addmm_(left, right, beta=kept, alpha=scale)
        kept = 1.0
    if kept != 1:
        values.mul_(kept)
    if step:
        step.descend_(values, *moments)
