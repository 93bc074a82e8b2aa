"""The folded form (docs/method.md, section 3): LoRA experts as state of the optimizer.

The model holds `W_eff = W + sum_i s_i B_i A_i` and nothing else; A and B of all experts of a layer
are stacked (`factors.py`) in the state of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.core.adam import compute_dtype, gradient, row_blocks
from molf.core.dense import Product
from molf.core.factors import draw_lora_a, live_ranks, owned_by, per_rank, split_factors
from molf.core.fidelity import UpdateTally
from molf.core.guard import Guarded
from molf.core.moments import moment_state
from molf.core.routed import RoutedLayer, States, dense_tensors

_FACTORS = ("lora_A", "lora_B")
_Move = tuple[float, Tensor, Tensor, Tensor, Tensor]  # s, A, B, dA, dB of a LoRA expert
_GRADIENT_ROWS = 256  # of a gradient in low precision, for one product: fewer would be slow


class FoldedLayer(RoutedLayer):
    """A layer whose group is [weight] or [weight, bias]."""

    def __init__(self, group: dict[str, Any], states: States) -> None:
        self.weight: Tensor = group["params"][0]
        self.state = _state_of(group, states)
        self._live = live_ranks(group["ranks"], self.state["lora_B"])
        # Where all experts have one `s`, products are made with it at no cost.
        self._has_one_scaling = len(set(group["scalings"])) == 1
        self._alpha: float = group["scalings"][0] if self._has_one_scaling else 1.0
        super().__init__(group, states, dense_tensors(group, group["params"], states))

    @classmethod
    def takes_part(cls, group: dict[str, Any]) -> bool:
        """Whether the weight has a gradient; the bias may have none.

        Raises:
            RuntimeError: The bias alone has one.
        """
        weight, *biases = group["params"]
        if weight.grad is None and any(bias.grad is not None for bias in biases):
            raise RuntimeError(
                f"Layer {group['layer']}: the weight got no gradient while the bias did. Every "
                "expert needs its gradient at every step: was the weight frozen after the "
                "optimizer was built?"
            )
        return weight.grad is not None

    @classmethod
    def gradients_of(cls, group: dict[str, Any], states: States) -> list[Guarded]:
        """Of the weight, which the factors' follow from, and of the bias where it has one."""
        weight, *biases = [p for p in group["params"] if p.grad is not None]
        state = states.get(weight) or _initial_factors(group)
        factors = tuple(state[key] for key in _FACTORS)
        return [Guarded(weight, max(group["scalings"]), factors), *map(Guarded, biases)]

    @classmethod
    def read_factors(cls, group: dict[str, Any], states: States) -> list[tuple[Tensor, Tensor]]:
        """Copies of (A [r, in], B [out, r]) of each LoRA expert; makes no state."""
        state = states.get(group["params"][0]) or _initial_factors(group)
        return split_factors(group["ranks"], state["lora_A"], state["lora_B"])

    @classmethod
    def write_factors(
        cls, group: dict[str, Any], states: States, lora_A: Tensor, lora_B: Tensor
    ) -> None:
        """Replace the stacked factors; the effective weight stays, its split changes."""
        state = _state_of(group, states)
        state["lora_A"].copy_(lora_A)
        state["lora_B"].copy_(lora_B)

    @property
    def steps_taken(self) -> int:
        """How many steps this layer has taken."""
        return self.state["step"]

    def _factor_shapes(self) -> tuple[int, int]:
        out_features, in_features = _oriented(self.weight, self.group).shape
        return in_features, out_features

    def _factor_gradients(self) -> tuple[Tensor, Tensor]:
        """`grad A_i = s_i B_i^T G` as [R, in] and `grad B_i = s_i G A_i^T` as [out, R]."""
        grad = _oriented(gradient(self.weight), self.group)
        A, B, alpha = self.state["lora_A"], self.state["lora_B"], self._alpha
        grad_A = torch.zeros_like(A)  # and stays so where B is zero
        if grad.dtype == A.dtype:
            grad_B = torch.addmm(B, grad, A.t(), beta=0, alpha=alpha)
            for live in self._live:
                grad_A[live].addmm_(B[:, live].t(), grad, beta=0, alpha=alpha)
        else:  # in parts: a float32 copy of the whole is as large as the weight's moments
            grad_B = torch.empty_like(B)
            for rows in row_blocks(grad, at_least=_GRADIENT_ROWS):
                part = grad[rows].to(A.dtype)
                grad_B[rows].addmm_(part, A.t(), beta=0, alpha=alpha)
                for live in self._live:
                    grad_A[live].addmm_(B[rows, live].t(), part, alpha=alpha)
        if not self._has_one_scaling:
            scalings = self._scalings
            grad_A.mul_(scalings[:, None])
            grad_B.mul_(scalings)
        return grad_A, grad_B

    @property
    def _scalings(self) -> Tensor:
        """`s_i` for each rank, [R]."""
        return per_rank(self.group["scalings"], self.group["ranks"], self.state["lora_A"])

    def _factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        first, second = (
            (self.state[f"{key}_exp_avg"], self.state[f"{key}_exp_avg_sq"]) for key in _FACTORS
        )
        return first, second

    def apply(self, winners: Sequence[int], tally: UpdateTally | None = None) -> None:
        """Count the step for every expert and give the winners theirs, each from the old state."""
        for tensor in self.dense:
            tensor.state["step"] += 1
        weight, *biases = self.dense
        full = weight.adamw_step() if 0 in winners else None
        moves = [self._factor_increments(index) for index in self._lora_winners(winners)]

        product = self._increment(full.decay if full else 0.0, moves)
        weight.move(full, tally, product, transposed=self.group["transposed"])
        for bias in biases:
            bias.move(bias.adamw_step("bias_weight_decay") if full else None, tally)
        for _, A, B, dA, dB in moves:
            A += dA
            B += dB

    def _increment(self, decay: float, moves: Sequence[_Move]) -> Product | None:
        """What the weight gains beside AdamW's step: moves of LoRA experts, and their decay back.

        Args:
            decay: The share by which the `full` expert decays; 0 where it has not won.
            moves: Of `_factor_increments`.
        """
        left, right, alpha = [], [], self._alpha
        # Each from the state before the step. B' A' - B A = dB A' + B dA, but the difference would
        # cancel: in float32 its relative error is 300 times larger.
        for scaling, A, B, dA, dB in moves:
            left += [_times(dB, scaling / alpha), _times(B, scaling / alpha)]
            right += [A + dA, dA]
        # It is W = W_eff - sum_i s_i B_i A_i that decays, so the experts get theirs back.
        stacked_A, stacked_B = self.state["lora_A"], self.state["lora_B"]
        live = self._live if decay else []
        right += [stacked_A[own] for own in live]
        if self._has_one_scaling and not moves:
            left, alpha = [stacked_B[:, own] for own in live], alpha * decay
        elif live:
            shares = self._scalings * (decay / alpha)
            left += [stacked_B[:, own] * shares[own] for own in live]
        return Product(_joined(left, 1), _joined(right, 0), alpha) if left else None

    def _expert(self, index: int) -> tuple[float, Tensor, Tensor]:
        """Return `s, A, B` of a LoRA expert; A and B are views of the state."""
        owned = owned_by(self.group["ranks"], index)
        A, B = self.state["lora_A"][owned], self.state["lora_B"][:, owned]
        return self.group["scalings"][index], A, B

    def _factor_increments(self, index: int) -> _Move:
        """Return `s, A, B, dA, dB` of a LoRA expert that moves to `A + dA`, `B + dB`."""
        owned, step = owned_by(self.group["ranks"], index), self._lora_step(index)
        scaling, A, B = self._expert(index)
        moments_A, moments_B = self._factor_moments()
        dA = step.increment(A, *(moment[owned] for moment in moments_A))
        dB = step.increment(B, *(moment[:, owned] for moment in moments_B))
        return scaling, A, B, dA, dB


def initial_state(group: dict[str, Any]) -> dict[str, Any]:
    """State of a routed weight before its first step: moments, factors and their moments."""
    state = moment_state(group["params"][0], group["state_dtype"]) | _initial_factors(group)
    for key in _FACTORS:
        state[f"{key}_exp_avg"] = torch.zeros_like(state[key])
        state[f"{key}_exp_avg_sq"] = torch.zeros_like(state[key])
    return state


def _initial_factors(group: dict[str, Any]) -> dict[str, Tensor]:
    """A [R, in] and B [out, R] before the first step, by their keys in the state."""
    weight: Tensor = group["params"][0]
    out_features, in_features = _oriented(weight, group).shape
    drawn = draw_lora_a(group["seed"], group["layer"], group["ranks"], in_features)
    lora_A = drawn.to(weight.device, compute_dtype(weight))
    lora_B = lora_A.new_zeros(out_features, sum(group["ranks"]))
    return dict(zip(_FACTORS, (lora_A, lora_B), strict=True))


def _state_of(group: dict[str, Any], states: States) -> dict[str, Any]:
    """State of a group's weight, made where there is none yet."""
    state = states[group["params"][0]]
    if "step" not in state:
        state.update(initial_state(group))
    return state


def _oriented(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """View a weight, or its gradient, as [out, in]."""
    return tensor.t() if group["transposed"] else tensor


def _times(tensor: Tensor, number: float) -> Tensor:
    """`tensor * number`, but nothing is copied where it is 1."""
    return tensor if number == 1 else tensor * number


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, but one tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
