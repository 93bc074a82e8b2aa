"""A dense tensor in a step: its moments move, then its values, and both are stored.

Here, and in the forms for LoRA factors, is all that touches elements of weights and moments with
torch operations; `molf.core.fused` does the same with kernels.
"""

from __future__ import annotations

from dataclasses import asdict
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core import one_pass
from molf.core.adam import (
    AdamWStep,
    MomentDecay,
    gradient,
    real_view,
    row_blocks,
    sum_dtype,
)
from molf.core.fidelity import UpdateTally
from molf.core.guard import FiniteGuard
from molf.core.moments import moment_state, moments_of
from molf.core.storage import StoredWeight, rounding_of

# Of a weight, for one product: fewer are slow. Where blocks are copies, more would take room.
_PRODUCT_ELEMENTS = 1 << 20
_PRODUCT_ROWS_OF_COPIES = 128


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

    def rows(self, rows: slice | EllipsisType, *, transposed: bool) -> Product:
        """Return the part for some rows of the stored tensor, which may be [in, out]."""
        if transposed:
            return self._replace(right=self.right[:, rows])
        return self._replace(left=self.left[rows])

    def to(self, dtype: torch.dtype) -> Product:
        """Return it in another dtype."""
        return Product(self.left.to(dtype), self.right.to(dtype), self.alpha)


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
        self._values = values = real_view(parameter)
        if "step" not in state:
            state.update(moment_state(values, group["state_dtype"]))
        self._stored = StoredWeight(
            values,
            state,
            rounding=rounding_of(values, group["weight_rounding"]),
            seed=group["seed"],
            name=name,
        )
        self._moments = moments_of(state)
        other = next((x for x in self._moments.shapes if x != values.shape), None)
        if other is not None:
            raise RuntimeError(
                f"A moment of {name} has shape {tuple(other)}, the parameter has "
                f"{tuple(values.shape)}: one of them was replaced. Drop the old state with "
                "optimizer.state.pop(parameter), or give it the new shape."
            )
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

    def update_moments(self, guard: FiniteGuard, score: str) -> list[Tensor]:
        """Move the moments; return the sums of the score's terms over blocks, 0-dim each."""
        self._decay = decay = self._decay_of(guard)
        self._advanced = True
        grad, moments = gradient(self.parameter), self._moments
        return [moments.advance(rows, grad[rows], decay, score) for rows in moments.blocks()]

    def adamw(self, guard: FiniteGuard, tally: UpdateTally | None) -> None:
        """Moments, counter and values at once, of a tensor that is not routed."""
        self._decay = self._decay_of(guard)
        self.state["step"] += 1
        step = self.adamw_step()
        if tally is None and self._decay.is_known_finite and self._is_plain:
            tensors = self._stored.read(), gradient(self.parameter), *self._moments.load(...)
            if one_pass.fits(*tensors):
                one_pass.adamw(*tensors, **asdict(step))
                return
        self.move(step, tally)

    def move(
        self,
        step: AdamWStep | None,
        tally: UpdateTally | None,
        product: Product | None = None,
        *,
        transposed: bool = False,
    ) -> None:
        """`p <- kept p + product - AdamW's direction`, rounded once; moments are stored.

        Args:
            step: The AdamW step with its decay; None leaves both away.
            tally: Where losses of rounding are counted, if anywhere.
            product: What is added.
            transposed: Whether the tensor is stored as [in, out].
        """
        if step is None and product is None and self._moments.is_settled:
            return
        assert self._decay is not None, "moments move first"
        parameter, grad, moments = self._values, gradient(self.parameter), self._moments
        at_least = 1 if product is None else self._product_rows()
        for rows in row_blocks(parameter, at_least=at_least, multiple=moments.multiple):
            moved = moments.settle(rows, grad[rows], self._decay, advanced=self._advanced)
            if step is None and product is None:
                continue
            part = product and product.rows(rows, transposed=transposed)
            values = self._stored.read(rows)
            if tally is None:
                _move_block(values, moved, step, part, transposed)
                self._stored.write(rows, values)
                continue
            picked, wide = tally.sample(parameter, rows), sum_dtype(values.device)
            before = values[picked].to(wide, copy=True)
            intended = before.clone()
            _move_block(
                intended,
                (moved[0][picked].to(wide), moved[1][picked].to(wide)),
                step,
                part and part.rows(picked, transposed=transposed).to(wide),
                transposed,
            )
            _move_block(values, moved, step, part, transposed)
            self._stored.write(rows, values)
            after = self._stored.read(rows)[picked].to(wide)
            tally.add(before, intended, after, weight=tally.weight(parameter))

    @property
    def _is_plain(self) -> bool:
        """Whether values and moments are kept as they are computed."""
        return self._stored.rounding == "none" and self._moments.is_settled

    def _product_rows(self) -> int:
        """Fewest rows of a block to which a product is added."""
        if self._is_plain:
            return -(-_PRODUCT_ELEMENTS // max(1, self.parameter.shape[-1]))
        return _PRODUCT_ROWS_OF_COPIES

    def _decay_of(self, guard: FiniteGuard) -> MomentDecay:
        return guard.decay_of(self.parameter.device, self._moments.dtype, self.group["betas"])


def _move_block(
    values: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamWStep | None,
    product: Product | None,
    transposed: bool,
) -> None:
    """Move one block in place."""
    kept = step.kept if step else 1.0
    if product is not None:
        target = values.t() if transposed else values
        target.addmm_(product.left, product.right, beta=kept, alpha=product.alpha)
    elif kept != 1:
        values.mul_(kept)
    if step:
        step.descend_(values, *moments)
