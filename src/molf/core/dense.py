"""A dense tensor in a step: its moments move, then its values, and both are stored.

Here, and in the forms for LoRA factors, is all that touches elements of weights and moments; what
would compute the same in fused kernels has its place here.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from molf.core.adam import (
    AdamWStep,
    MomentDecay,
    gradient,
    row_blocks,
    score_terms,
    sum_dtype,
)
from molf.core.fidelity import UpdateTally
from molf.core.guard import FiniteGuard
from molf.core.moments import moment_state, moments_of
from molf.core.storage import StoredWeight, rounding_of

_PRODUCT_ROWS = 128  # of a weight, for one product: fewer would be slow, more would be temporaries


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
        grad = gradient(self.parameter)
        total = grad.new_zeros((), dtype=sum_dtype(device))
        for rows in row_blocks(self.parameter, multiple=self._moments.multiple):
            moved = self._moments.advance(rows, grad[rows], decay)
            total += score_terms(*moved, score).sum()
        return total

    def adamw(self, guard: FiniteGuard, tally: UpdateTally | None) -> None:
        """Moments, counter and values at once, of a tensor that is not routed."""
        self._decay = self._decay_of(guard)
        if self._moments.is_settled:
            grad = gradient(self.parameter)
            for rows in row_blocks(self.parameter):
                self._moments.advance(rows, grad[rows], self._decay)
        self.state["step"] += 1
        self.move(self.adamw_step(), tally)

    def move(
        self,
        step: AdamWStep | None,
        tally: UpdateTally | None,
        product: tuple[Tensor, Tensor] | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        """`p <- kept p + left @ right - AdamW's direction`, rounded once; moments are stored.

        Args:
            step: The AdamW step with its decay; None leaves both away.
            tally: Where losses of rounding are counted, if anywhere.
            product: `left` [out, k] and `right` [k, in] of what is added.
            transposed: Whether the tensor is stored as [in, out].
        """
        if step is None and product is None and self._moments.is_settled:
            return
        assert self._decay is not None, "moments move first"
        parameter, grad, moments = self.parameter, gradient(self.parameter), self._moments
        at_least = 1 if product is None else _PRODUCT_ROWS
        for rows in row_blocks(parameter, at_least=at_least, multiple=moments.multiple):
            moved = moments.settle(rows, grad[rows], self._decay)
            if step is None and product is None:
                continue
            part = None if product is None else _part_of(product, rows, transposed)
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
                None if part is None else _picked(part, picked, transposed, wide),
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
    product: tuple[Tensor, Tensor] | None,
    transposed: bool,
) -> None:
    """Move one block in place."""
    kept = step.kept if step else 1.0
    if product is not None:
        (values.t() if transposed else values).addmm_(*product, beta=kept)
    elif kept != 1:
        values.mul_(kept)
    if step:
        step.descend_(values, *moments)


def _part_of(
    product: tuple[Tensor, Tensor], rows: slice | EllipsisType, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The operands of some rows of the stored tensor."""
    left, right = product
    return (left, right[:, rows]) if transposed else (left[rows], right)


def _picked(
    product: tuple[Tensor, Tensor],
    picked: slice | EllipsisType,
    transposed: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    left, right = _part_of(product, picked, transposed)
    return left.to(dtype), right.to(dtype)
