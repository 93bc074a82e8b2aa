"""A layer of the folded form that hands its work to the kernels instead of doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molf.core.adam import AdamWStep, gradient
from molf.core.dense import DenseTensor
from molf.core.factors import owned_by
from molf.core.folded import FoldedLayer
from molf.core.fused.items import AdamW, Factor, LowRank, Moments, Output, Step, Weight

_FLOAT32_BYTES = 4


@dataclass
class Move:
    """How one dense tensor moves: what the kernels write, in terms of the eager arithmetic.

    Attributes:
        tensor: The tensor.
        step: Its AdamW step; None where only the product is added.
        product: `left` [rows, k] and `right` [k, columns] in the tensor's own orientation.
        has_moved_moments: Whether the moments are those after this step already.
    """

    tensor: DenseTensor
    step: AdamWStep | None
    product: tuple[Tensor, Tensor] | None = None
    has_moved_moments: bool = True

    def item(self) -> AdamW | LowRank:
        """Return the same for the kernels; the counter has moved already."""
        tensor, stored = self.tensor, self.tensor.stored
        key = stored.step_key() if stored.rounding == "stochastic" else None
        weight = Weight(tensor.parameter.detach(), stored.low, key)
        moments = tensor.state["exp_avg"], tensor.state["exp_avg_sq"]
        if self.product is not None:
            full = None if self.step is None else (*moments, scalars(self.step))
            return LowRank(weight, *self.product, full)
        assert self.step is not None, "a tensor without a step needs no write"
        if self.has_moved_moments:
            return AdamW(weight, *moments, scalars(self.step))
        betas = tensor.group["betas"]
        return AdamW(weight, *moments, scalars(self.step), gradient(tensor.parameter), betas)


def scalars(step: AdamWStep) -> Step:
    """Return a step's numbers as the kernels take them."""
    return Step.of(step.lr, step.weight_decay, step.betas, step.eps, step.step)


class FusedLayer(FoldedLayer):
    """A routed layer for the length of one step of the kernels."""

    def dense_moments(self) -> list[Moments]:
        """The moments of `full`: of the weight, and of the bias if there is one."""
        return [
            Moments(
                gradient(tensor.parameter),
                tensor.state["exp_avg"],
                tensor.state["exp_avg_sq"],
                self.group["betas"],
            )
            for tensor in self.dense
        ]

    def factor_moments(self) -> list[Moments]:
        """The moments of A and B of each LoRA expert in turn; takes the two thin products."""
        grad_A, grad_B = self._factor_gradients()
        moments_A, moments_B = self._factor_moments()
        items = []
        for index in range(len(self.group["ranks"])):
            own = owned_by(self.group["ranks"], index)
            m_A, v_A = (moment[own] for moment in moments_A)
            m_B, v_B = (moment[:, own] for moment in moments_B)
            items.append(Moments(grad_A[own], m_A, v_A, self.group["betas"]))
            items.append(Moments(grad_B[:, own], m_B, v_B, self.group["betas"]))
        return items

    @property
    def factor_bytes(self) -> int:
        """Bytes that the gradients of the factors take."""
        return _FLOAT32_BYTES * sum(self._factor_shapes()) * sum(self.group["ranks"])

    def operand_bytes(self, winners: Sequence[int]) -> int:
        """Bytes that the operands of the weight's product take at most."""
        ranks = self.group["ranks"]
        width = sum(2 * ranks[index] for index in self._lora_winners(winners))
        width += sum(ranks) if 0 in winners else 0
        return _FLOAT32_BYTES * sum(self._factor_shapes()) * width

    def count_step(self) -> None:
        """Count the step, which every expert takes part in."""
        for tensor in self.dense:
            tensor.state["step"] += 1

    def moves(self, winners: Sequence[int]) -> tuple[list[Move], list[Factor]]:
        """Return how the winners move the weight and the bias, and the steps of their factors.

        The product's operands are complete when the factors have been stepped.
        """
        weight, *biases = self.dense
        full = weight.adamw_step() if 0 in winners else None
        product, factors = self._product(self._lora_winners(winners), full.decay if full else 0.0)
        if product is not None and self.group["transposed"]:
            product = product[1].t(), product[0].t()
        moves = [Move(weight, full, product)]
        if full:
            moves += [Move(bias, bias.adamw_step("bias_weight_decay")) for bias in biases]
        return moves, factors

    def _product(
        self, won: Sequence[int], decay: float
    ) -> tuple[tuple[Tensor, Tensor] | None, list[Factor]]:
        """Return `left` [out, k], `right` [k, in], and the factor steps that fill them.

        The weight moves by `s (dB A' + B dA)` for each expert in `won`; and by `decay s B A` for
        every expert, because it is `W = W_eff - sum_i s_i B_i A_i` that decays.
        """
        if not won and not decay:
            return None, []
        A, B, ranks = self.state["lora_A"], self.state["lora_B"], self.group["ranks"]
        taking_part = [index for index in range(len(ranks)) if index in won or decay]
        widths = [ranks[index] * (1 + (index in won)) for index in taking_part]
        left = B.new_empty(len(B), sum(widths))
        # Where nothing but the decay is added, the stacked A is the operand itself.
        right = A.new_empty(sum(widths), A.shape[1]) if won else A
        factors: list[Factor] = []
        end = 0
        for index, width in zip(taking_part, widths, strict=True):
            start, end = end, end + width
            scaling, own = self.group["scalings"][index], owned_by(ranks, index)
            if index in won:
                operands = left[:, start:end], right[start:end]
                factors += self._factor_steps(index, scaling, decay, *operands)
            else:
                torch.mul(B[:, own], decay * scaling, out=left[:, start:end])
                if won:
                    right[start:end].copy_(A[own])
        return (left, right), factors

    def _factor_steps(
        self, index: int, scaling: float, decay: float, left: Tensor, right: Tensor
    ) -> list[Factor]:
        """The steps of A and B of a winner, with `s dB`, `s B` and `A'`, `dA + decay A`."""
        own, rank = owned_by(self.group["ranks"], index), self.group["ranks"][index]
        step = scalars(self._lora_step(index))
        moments_A, moments_B = self._factor_moments()
        of_B = Output(left[:, :rank], 0.0, scaling), Output(left[:, rank:], scaling, 0.0)
        of_A = Output(right[:rank], 1.0, 1.0), Output(right[rank:], decay, 1.0)
        A, B = self.state["lora_A"][own], self.state["lora_B"][:, own]
        m_A, v_A = (moment[own] for moment in moments_A)
        m_B, v_B = (moment[:, own] for moment in moments_B)
        return [Factor(B, m_B, v_B, step, of_B), Factor(A, m_A, v_A, step, of_A)]
