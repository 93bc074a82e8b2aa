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

from molf.core.adam import adamw_, gradient, moment_state, state_dtype
from molf.core.factors import owned_by, per_rank, split_factors
from molf.core.routed import RoutedLayer, States


class AdapterLayer(RoutedLayer):
    """A layer whose group ends in [lora_A, lora_B], after [weight] or [weight, bias] if trainable.

    `lora_A` is [R, in], `lora_B` [out, R], in any floating-point dtype. Moments are float32
    (float64 for float64 adapters) and those of the paper's A_i and B_i, not of the stored columns.
    """

    def __init__(self, group: dict[str, Any], states: States) -> None:
        *dense, self.lora_A, self.lora_B = group["params"]
        taking_part = [p for p in dense if p.grad is not None]
        for parameter in (*taking_part, self.lora_A, self.lora_B):
            if "step" not in states[parameter]:
                states[parameter].update(moment_state(parameter))
        self.states = states[self.lora_A], states[self.lora_B]
        super().__init__(group, [(p, states[p]) for p in taking_part])

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
    def read_factors(cls, group: dict[str, Any], states: States) -> list[tuple[Tensor, Tensor]]:
        """Copies of (A [r, in], B [out, r]) of each expert: the stored columns over `c_i`."""
        lora_A, lora_B = (_in_state_dtype(p) for p in group["params"][-2:])
        return split_factors(group["ranks"], lora_A, lora_B / _columns_scale(group, lora_B))

    @classmethod
    def write_factors(
        cls, group: dict[str, Any], states: States, lora_A: Tensor, lora_B: Tensor
    ) -> None:
        """Replace the adapter's weights by the stacked factors; its output changes with them."""
        stored_A, stored_B = group["params"][-2:]
        stored_A.copy_(lora_A)
        stored_B.copy_(lora_B * _columns_scale(group, lora_B))

    @property
    def with_gradients(self) -> list[Tensor]:
        """The adapter's factors, after the tensors of `full`."""
        return [*(parameter for parameter, _ in self.dense), self.lora_A, self.lora_B]

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

    def apply(self, winners: Sequence[int]) -> None:
        """Count the step for every expert and give the winners theirs, each from the old state."""
        for state in (*(state for _, state in self.dense), *self.states):
            state["step"] += 1
        if self.has_full and 0 in winners:
            for (parameter, state), decay in zip(
                self.dense, ("weight_decay", "bias_weight_decay"), strict=False
            ):
                adamw_(parameter, state, self._dense_step(decay, state))
        scales = stored_scales(self.group)
        moments_A, moments_B = self._factor_moments()
        for index in self._lora_winners(winners):
            owned, step = owned_by(self.group["ranks"], index), self._lora_step(index)
            # What is stored for B_i is c_i B_i, and so its increment is c_i dB_i.
            for stored, moments, scale in (
                (self.lora_A[owned], [moment[owned] for moment in moments_A], 1.0),
                (self.lora_B[:, owned], [moment[:, owned] for moment in moments_B], scales[index]),
            ):
                # Low-precision factors are moved in the state's dtype and rounded once.
                values = stored.to(moments[0].dtype)
                stored.copy_(values + step.increment(values, *moments, scale=scale))


def stored_scales(group: dict[str, Any]) -> list[float]:
    """`c_i = s_i / s`: what the columns of expert i are stored times."""
    return [scaling / group["adapter_scaling"] for scaling in group["scalings"]]


def _columns_scale(group: dict[str, Any], like: Tensor) -> Tensor:
    """`c_i`, repeated for every column of B that expert i owns, [R]."""
    return per_rank(stored_scales(group), group["ranks"], like)


def _in_state_dtype(parameter: Tensor) -> Tensor:
    return parameter.detach().to(state_dtype(parameter))
