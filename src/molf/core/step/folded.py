"""The folded form (docs/method.md, section 3): LoRA experts are optimizer state.

The model holds `W_eff = W + sum_i s_i B_i A_i`. The state of the weight holds A [R, in] and
B [out, R], stacked over the layer's experts (`factors.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molf.core.arithmetic.adam import compute_dtype, gradient
from molf.core.arithmetic.blocks import Blocks
from molf.core.arithmetic.devices import CanRead
from molf.core.arithmetic.weight_step import Product
from molf.core.model.factors import draw_lora_a, live_ranks, owned_by, per_rank, split_factors
from molf.core.step.dense import DenseTensor
from molf.core.step.guard import Guarded
from molf.core.step.layer import RoutedLayer, States, dense_tensors
from molf.core.step.operations import FactorWrite, LayerWrites, Operand, TensorWrite
from molf.core.storage.collectives import Cut
from molf.core.storage.moments import moment_state
from molf.core.storage.place import WHOLE, Place
from molf.core.storage.sharding import cut_dimension

_FACTORS = ("lora_A", "lora_B")
_GRADIENT_ROWS = 256  # of a gradient in low precision, for one product: fewer would be slow


class FoldedLayer(RoutedLayer):
    """Routed layer with the group [weight] or [weight, bias]."""

    def _open(self, states: States, can_read: CanRead) -> list[DenseTensor]:
        """Find weight, bias and factors; see which of the factors are not zero."""
        group, places = self.group, self.places
        self.weight: Tensor = group["params"][0]
        self.state = _state_of(group, states, places[0])
        lora_B = self.state["lora_B"]
        # On shards all columns: the widths of collectives must not depend on a shard's own B.
        can_skip = can_read(lora_B.device) and places[0].processes.is_one
        self._live = live_ranks(group["ranks"], lora_B, can_read=can_skip)
        # One `s` for all experts is the `alpha` of a product, which costs nothing.
        self._has_one_scaling = len(set(group["scalings"])) == 1
        self._alpha: float = group["scalings"][0] if self._has_one_scaling else 1.0
        return dense_tensors(group, group["params"], states, places)

    @classmethod
    def takes_part(cls, group: dict[str, Any]) -> bool:
        """Return whether the weight has a gradient; the bias may have none.

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
        """Return the gradients of the weight (multiplied by the factors) and of the bias."""
        weight, *biases = [p for p in group["params"] if p.grad is not None]
        state = states.get(weight) or _initial_factors(group, WHOLE)  # shards have a state
        factors = tuple(state[key] for key in _FACTORS)
        return [Guarded(weight, max(group["scalings"]), factors), *map(Guarded, biases)]

    @classmethod
    def read_factors(
        cls, group: dict[str, Any], states: States, places: Sequence[Place]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return copies of (A [r, in], B [out, r]) of each LoRA expert; create no state."""
        place = places[0]
        state = states.get(group["params"][0]) or _initial_factors(group, place)
        sizes = reversed(_shape_of(group, place))  # (in, out)
        parts = [
            Cut(state[key], dim, size)
            for key, dim, size in zip(_FACTORS, (1, 0), sizes, strict=True)
        ]
        return split_factors(group["ranks"], *place.processes.gather(parts))

    @classmethod
    def write_factors(
        cls,
        group: dict[str, Any],
        states: States,
        places: Sequence[Place],
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> None:
        """Replace the stacked factors; `W_eff` stays, W changes."""
        state, processes = _state_of(group, states, places[0]), places[0].processes
        state["lora_A"].copy_(lora_A[:, processes.part(lora_A.shape[1])])
        state["lora_B"].copy_(lora_B[processes.part(len(lora_B))])

    @classmethod
    def cut_of(cls, group: dict[str, Any], parameter: Tensor, key: str) -> tuple[int, int]:
        """Return the features for the factors and their moments, the rows for all else."""
        if not key.startswith(_FACTORS):
            return super().cut_of(group, parameter, key)
        dim = cut_dimension(key)
        sides = parameter.shape[::-1] if group["transposed"] else parameter.shape
        return dim, sides[dim]

    @property
    def steps_taken(self) -> int:
        """Number of steps of this layer."""
        return self.state["step"]

    @property
    def kept(self) -> dict[str, Any]:
        """State of the weight."""
        return self.state

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole layer."""
        return _shape_of(self.group, self.places[0])

    @property
    def far_part(self) -> int:
        """A; B if the weight is stored as [in, out]."""
        return int(self.group["transposed"])

    @property
    def far_factor(self) -> Cut | None:
        """A [R, part of in]; B [part of out, R] if the weight is stored as [in, out]."""
        part = self.far_part
        return Cut(self.state[_FACTORS[part]], 1 - part, self.shape[1 - part])

    def factor_gradients(self, blocks: Blocks, far: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `grad A_i = s_i B_i^T G` [R, in] and `grad B_i = s_i G A_i^T` [out, R].

        On shards G has this process's rows, and `far` is the whole far factor: the gradient of the
        near factor has this process's part, that of the far factor is this shard's term of a sum.
        """
        grad = _oriented(gradient(self.weight), self.group)  # [out, in]
        factors = [self.state[key] for key in _FACTORS]
        if far is not None:
            factors[self.far_part] = far
        (A, B), alpha = factors, self._alpha
        # Two products for all experts of the layer, because their factors are stacked.
        # `grad A` of an expert with B = 0 is zero: it stays as allocated.
        grad_A = torch.zeros_like(A)
        if grad.dtype == A.dtype:
            grad_B = torch.addmm(B, grad, A.t(), beta=0, alpha=alpha)
            for live in self._live:
                grad_A[live].addmm_(B[:, live].t(), grad, beta=0, alpha=alpha)
        else:
            # In parts: a float32 copy of all of G would be as large as a moment.
            # Zeros, because a shard without rows of a transposed weight has no part.
            grad_B = torch.zeros_like(B)
            for rows in blocks.of(grad, at_least=_GRADIENT_ROWS):
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

    def factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (m, v) of the stacked A [R, in] and (m, v) of the stacked B [out, R]."""
        first, second = (
            (self.state[f"{key}_exp_avg"], self.state[f"{key}_exp_avg_sq"]) for key in _FACTORS
        )
        return first, second

    def writes(self, winners: Sequence[int]) -> LayerWrites:
        """Increment the step counters of all experts; list the writes of the winners."""
        for tensor in self.dense:
            tensor.state["step"] += 1
        weight, *biases = self.dense
        full = weight.adamw_step() if 0 in winners else None
        # W decays, and the model holds W_eff: `_product` adds the LoRA part of the decay back.
        decay = full.decay if full else 0.0
        product, factors = self._product(self._lora_winners(winners), decay)
        tensors = [TensorWrite(weight, full, product, self.group["transposed"])]
        steps = [bias.adamw_step("bias_weight_decay") if full else None for bias in biases]
        tensors += [TensorWrite(bias, step) for bias, step in zip(biases, steps, strict=True)]
        return LayerWrites(factors, tensors)

    def _product(
        self, won: Sequence[int], decay: float
    ) -> tuple[Product | None, list[FactorWrite]]:
        """Return the low-rank change of the weight, and the factor writes that fill its operands.

        LoRA expert i won: `s_i (dB_i A_i' + B_i dA_i)`. `full` won: `decay sum_i s_i B_i A_i`.

        Args:
            won: Indices of the LoRA experts that have won.
            decay: `lr wd` of the `full` expert; 0 if it has not won.
        """
        # `s (B' A' - B A)` is the same number but cancels: its relative error in float32 is 300
        # times larger.
        A, B, ranks = self.state["lora_A"], self.state["lora_B"], self.group["ranks"]
        live = self._live if decay else []
        if not won and not live:
            return None, []
        alpha = self._alpha
        shares = self._scalings * (decay / alpha) if live else None
        if not won and self._has_one_scaling:
            alpha, shares = alpha * decay, None
            if len(live) == 1:  # views: no copy
                return Product(B[:, live[0]], A[live[0]], alpha), []

        # Operands of all winners side by side: one product per layer.
        width = 2 * sum(ranks[index] for index in won) + sum(own.stop - own.start for own in live)
        left, right = B.new_empty(len(B), width), A.new_empty(width, A.shape[1])
        factors: list[FactorWrite] = []
        start = 0
        for index in won:
            middle, end = start + ranks[index], start + 2 * ranks[index]
            share = self.group["scalings"][index] / alpha
            # left @ right = share (dB A' + B dA)
            of_A = Operand(right[start:middle], 1.0, 1.0), Operand(right[middle:end], 0.0, 1.0)
            of_B = (
                Operand(left[:, start:middle], 0.0, share),
                Operand(left[:, middle:end], share, 0.0),
            )
            factors += self._factor_writes(index, of_A, of_B)
            start = end
        for own in live:
            end = start + own.stop - own.start
            right[start:end] = A[own]
            left[:, start:end] = B[:, own] if shares is None else B[:, own] * shares[own]
            start = end
        return Product(left, right, alpha), factors

    def _factor_writes(
        self, index: int, of_A: tuple[Operand, Operand], of_B: tuple[Operand, Operand]
    ) -> list[FactorWrite]:
        """Return the writes of A and B of one LoRA expert, as views of the state."""
        own, step = owned_by(self.group["ranks"], index), self._lora_step(index)
        moments_A, moments_B = self.factor_moments()
        A, B = self.state["lora_A"][own], self.state["lora_B"][:, own]
        m_A, v_A = (moment[own] for moment in moments_A)
        m_B, v_B = (moment[:, own] for moment in moments_B)
        return [FactorWrite(A, m_A, v_A, step, of_A), FactorWrite(B, m_B, v_B, step, of_B)]


def initial_state(group: dict[str, Any], place: Place = WHOLE) -> dict[str, Any]:
    """Return the initial state of a routed weight: moments, factors and their moments.

    Args:
        group: Parameter group of the layer.
        place: Location of the weight in the whole weight; the factors get the same processes.
    """
    moments = moment_state(group["params"][0], group["state_dtype"], place)
    state = moments | _initial_factors(group, place)
    for key in _FACTORS:
        state[f"{key}_exp_avg"] = torch.zeros_like(state[key])
        state[f"{key}_exp_avg_sq"] = torch.zeros_like(state[key])
    return state


def _initial_factors(group: dict[str, Any], place: Place) -> dict[str, Tensor]:
    """Return this process's part of the initial A [R, in] and B [out, R], by their keys."""
    weight: Tensor = group["params"][0]
    out_features, in_features = _shape_of(group, place)
    drawn = draw_lora_a(group["seed"], group["layer"], group["ranks"], in_features)
    columns, rows = place.processes.part(in_features), place.processes.part(out_features)
    lora_A = drawn[:, columns].to(weight.device, compute_dtype(weight)).contiguous()
    lora_B = lora_A.new_zeros(rows.stop - rows.start, sum(group["ranks"]))
    return dict(zip(_FACTORS, (lora_A, lora_B), strict=True))


def _state_of(group: dict[str, Any], states: States, place: Place) -> dict[str, Any]:
    """Return the state of a group's weight; create it if it is missing."""
    state = states[group["params"][0]]
    if "step" not in state:
        state.update(initial_state(group, place))
    return state


def _shape_of(group: dict[str, Any], place: Place) -> tuple[int, int]:
    """Return (out, in) of the whole layer."""
    rows, columns = place.shape(group["params"][0])
    return (columns, rows) if group["transposed"] else (rows, columns)


def _oriented(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a view of a weight, or of its gradient, as [out, in]."""
    return tensor.t() if group["transposed"] else tensor
