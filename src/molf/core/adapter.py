"""The adapter form (docs/method.md, section 4): LoRA experts as slices of one PEFT adapter.

The model computes `W x + s B (A x)` with one ordinary LoRA adapter of rank R = sum of ranks and
scaling s. Expert i owns rows of A and columns of B; the columns hold `c_i B_i` with
`c_i = s_i / s`, so that the adapter as a whole is `sum_i s_i B_i A_i`. The gradients are
autograd's. With a frozen base there is no `full` expert (MoLF-Efficient); with a trainable one
`full` is {W, b}, kept apart from the experts (the explicit form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molf.core.adam import AdamWStep, gradient, sum_dtype
from molf.core.factors import owned_by, per_rank, split_factors
from molf.core.fidelity import UpdateTally
from molf.core.groups import parameter_name
from molf.core.guard import Guarded
from molf.core.moments import moment_state
from molf.core.routed import RoutedLayer, States, dense_tensors
from molf.core.storage import StoredWeight, rounding_of, stored_values


class AdapterLayer(RoutedLayer):
    """A layer whose group ends in [lora_A, lora_B], after [weight] or [weight, bias] if trainable.

    `lora_A` is [R, in], `lora_B` [out, R], in any floating-point dtype. Moments are float32
    (float64 for float64 adapters) and those of the paper's A_i and B_i, not of the stored columns.
    """

    def __init__(self, group: dict[str, Any], states: States) -> None:
        *dense, self.lora_A, self.lora_B = group["params"]
        self.states = states[self.lora_A], states[self.lora_B]
        for parameter, state in zip((self.lora_A, self.lora_B), self.states, strict=True):
            if "step" not in state:
                # Factors are small beside the weights: their moments are never 8-bit.
                state.update(moment_state(parameter))
        self._stored = _stored_factors(group, states)
        super().__init__(group, states, dense_tensors(group, dense, states))

    @classmethod
    def takes_part(cls, group: dict[str, Any]) -> bool:
        """Whether the factors, and the weight where it is trained, have a gradient.

        Raises:
            RuntimeError: Some have one and some have none: the experts' scores would not compare.
        """
        *dense, lora_A, lora_B = group["params"]
        named = {"lora_A": lora_A, "lora_B": lora_B} | ({"weight": dense[0]} if dense else {})
        missing = [name for name, parameter in named.items() if parameter.grad is None]
        if 0 < len(missing) < len(named):
            raise RuntimeError(
                f"Layer {group['layer']}: {' and '.join(missing)} got no gradient while the rest "
                "of the layer did. Every expert needs its gradient at every step: was something "
                "frozen, or the adapter disabled, after the optimizer was built?"
            )
        return not missing

    @classmethod
    def gradients_of(cls, group: dict[str, Any], states: States) -> list[Guarded]:
        """Of the tensors of `full`, then of the adapter's factors."""
        *dense, lora_A, lora_B = group["params"]
        full = [Guarded(parameter) for parameter in dense if parameter.grad is not None]
        return [*full, Guarded(lora_A), Guarded(lora_B, max(stored_scales(group)))]

    @classmethod
    def read_factors(cls, group: dict[str, Any], states: States) -> list[tuple[Tensor, Tensor]]:
        """Copies of (A [r, in], B [out, r]) of each expert: the stored columns over `c_i`."""
        # `get`: reading makes no state.
        lora_A, lora_B = (stored_values(p, states.get(p) or {}) for p in group["params"][-2:])
        return split_factors(group["ranks"], lora_A, lora_B / _columns_scale(group, lora_B))

    @classmethod
    def write_factors(
        cls, group: dict[str, Any], states: States, lora_A: Tensor, lora_B: Tensor
    ) -> None:
        """Replace the adapter's weights by the stacked factors; its output changes with them."""
        new = lora_A, lora_B * _columns_scale(group, lora_B)
        for stored, values in zip(_stored_factors(group, states), new, strict=True):
            stored.assign(values)

    @property
    def steps_taken(self) -> int:
        """How many steps this layer has taken."""
        return self.states[0]["step"]

    def _factor_shapes(self) -> tuple[int, int]:
        return self.lora_A.shape[1], self.lora_B.shape[0]

    def _factor_gradients(self) -> tuple[Tensor, Tensor]:
        """Rows of A have their gradient as it is; that of B_i is `c_i` times its columns'."""
        grad_A = gradient(self.lora_A).to(self.states[0]["exp_avg"].dtype)
        grad_B = gradient(self.lora_B).to(self.states[1]["exp_avg"].dtype)
        return grad_A, grad_B * _columns_scale(self.group, grad_B)

    def _factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        first, second = ((state["exp_avg"], state["exp_avg_sq"]) for state in self.states)
        return first, second

    def apply(self, winners: Sequence[int], tally: UpdateTally | None = None) -> None:
        """Count the step for every expert and give the winners theirs, each from the old state."""
        for state in (*(tensor.state for tensor in self.dense), *self.states):
            state["step"] += 1
        full = self.has_full and 0 in winners
        # `zip` cuts: a bias may be missing.
        for tensor, decay in zip(self.dense, ("weight_decay", "bias_weight_decay"), strict=False):
            tensor.move(tensor.adamw_step(decay) if full else None, tally)
        indices = self._lora_winners(winners)
        if not indices:
            return
        scales = stored_scales(self.group)
        for number, stored in enumerate(self._stored):
            values = stored.read()
            counted = None if tally is None else _Counted(tally, values)
            for index in indices:
                owned, step = owned_by(self.group["ranks"], index), self._lora_step(index)
                # What is stored for B_i is c_i B_i, and so its increment is c_i dB_i.
                where, scale = ((owned,), 1.0) if number == 0 else ((..., owned), scales[index])
                moments = [moment[where] for moment in self._factor_moments()[number]]
                if counted:
                    counted.intend(where, step, moments, scale)
                _move(values[where], moments, step, scale)
            stored.write(..., values)
            if counted:
                counted.compare(stored.read())


class _Counted:
    """One factor's update, beside the same in float64; factors are small, so all of it."""

    def __init__(self, tally: UpdateTally, values: Tensor) -> None:
        self._tally = tally
        self._before = values.to(sum_dtype(values.device), copy=True)
        self._intended = self._before.clone()

    def intend(self, where: Any, step: AdamWStep, moments: Sequence[Tensor], scale: float) -> None:
        """Move an expert's slice."""
        wide = [moment.to(self._before.dtype) for moment in moments]
        _move(self._intended[where], wide, step, scale)

    def compare(self, after: Tensor) -> None:
        """Count what has arrived."""
        self._tally.add(self._before, self._intended, after.to(self._before.dtype))


def _move(values: Tensor, moments: Sequence[Tensor], step: AdamWStep, scale: float) -> None:
    """Move an expert's slice in place; it decays as it is stored."""
    if step.decay:
        values.mul_(step.kept)
    step.descend_(values, *moments, scale=scale)


def _stored_factors(group: dict[str, Any], states: States) -> list[StoredWeight]:
    """A and B as they are stored; they are the last of the group."""
    first = len(group["params"]) - 2
    return [
        StoredWeight(
            parameter,
            states[parameter],
            rounding=rounding_of(parameter, group["weight_rounding"]),
            seed=group["seed"],
            name=parameter_name(group, index),
        )
        for index, parameter in enumerate(group["params"][first:], first)
    ]


def stored_scales(group: dict[str, Any]) -> list[float]:
    """`c_i = s_i / s`: what the columns of expert i are stored times."""
    return [scaling / group["adapter_scaling"] for scaling in group["scalings"]]


def _columns_scale(group: dict[str, Any], like: Tensor) -> Tensor:
    """`c_i`, repeated for every column of B that expert i owns, [R]."""
    return per_rank(stored_scales(group), group["ranks"], like)
