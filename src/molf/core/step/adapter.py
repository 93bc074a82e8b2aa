"""The adapter form (docs/method.md, section 4): LoRA experts are slices of one PEFT adapter.

The model computes `W x + s B (A x)` with one LoRA adapter of rank R = sum of ranks and scaling s.
Expert i owns rows of A and columns of B. The columns hold `c_i B_i` with `c_i = s_i / s`, so the
adapter is `sum_i s_i B_i A_i`. A frozen base has no `full` expert (MoLF-Efficient); a trained base
is the `full` expert {W, b} (explicit form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molf.core.arithmetic.adam import gradient
from molf.core.arithmetic.blocks import Blocks
from molf.core.arithmetic.devices import CanRead
from molf.core.model.factors import owned_by, per_rank, split_factors
from molf.core.model.groups import parameter_name
from molf.core.step.dense import DenseTensor
from molf.core.step.guard import Guarded
from molf.core.step.layer import RoutedLayer, States, dense_tensors
from molf.core.step.operations import AdapterSlice, AdapterWrite, LayerWrites, TensorWrite
from molf.core.storage.collectives import Cut
from molf.core.storage.moments import moment_state
from molf.core.storage.place import Place
from molf.core.storage.weights import StoredWeight, rounding_of, stored_values


class AdapterLayer(RoutedLayer):
    """Routed layer with the group [lora_A, lora_B], after [weight] or [weight, bias] if trained.

    `lora_A` is [R, in], `lora_B` [out, R], in any floating-point dtype. Moments are float32
    (float64 for float64 adapters). They are moments of A_i and B_i, not of the stored `c_i B_i`.
    """

    def _open(self, states: States, can_read: CanRead) -> list[DenseTensor]:
        """Find the base's tensors and the adapter's factors."""
        group, places = self.group, self.places
        *dense, self.lora_A, self.lora_B = group["params"]
        self.states = states[self.lora_A], states[self.lora_B]
        for parameter, state in zip((self.lora_A, self.lora_B), self.states, strict=True):
            if "step" not in state:
                # Factors are small: 8-bit moments would save little.
                state.update(moment_state(parameter))
        self._stored = _stored_factors(group, states, places)
        return dense_tensors(group, dense, states, places)

    @classmethod
    def takes_part(cls, group: dict[str, Any]) -> bool:
        """Return whether the factors, and a trained weight, have a gradient.

        Raises:
            RuntimeError: Some have a gradient and some have none.
        """
        # Scores compare only if every expert has a gradient of the same step.
        *dense, lora_A, lora_B = group["params"]
        named = {"lora_A": lora_A, "lora_B": lora_B} | ({"weight": dense[0]} if dense else {})
        missing = [name for name, parameter in named.items() if parameter.grad is None]
        if missing and any(parameter.grad is not None for parameter in group["params"]):
            raise RuntimeError(
                f"Layer {group['layer']}: {' and '.join(missing)} got no gradient while the rest "
                "of the layer did. Every expert needs its gradient at every step: was something "
                "frozen, or the adapter disabled, after the optimizer was built?"
            )
        return not missing

    @classmethod
    def gradients_of(cls, group: dict[str, Any], states: States) -> list[Guarded]:
        """Return the gradients of `full`, then of the adapter's factors."""
        *dense, lora_A, lora_B = group["params"]
        full = [Guarded(parameter) for parameter in dense if parameter.grad is not None]
        return [*full, Guarded(lora_A), Guarded(lora_B, max(stored_scales(group)))]

    @classmethod
    def read_factors(
        cls, group: dict[str, Any], states: States, places: Sequence[Place]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return copies of (A [r, in], B [out, r]) of each LoRA expert; create no state."""
        parts = [
            # `get`: a defaultdict would create state.
            Cut(stored_values(p, states.get(p) or {}), 0, place.rows(p))
            for p, place in zip(group["params"][-2:], places[-2:], strict=True)
        ]
        lora_A, lora_B = places[-1].processes.gather(parts)
        return split_factors(group["ranks"], lora_A, lora_B / _columns_scale(group, lora_B))

    @classmethod
    def write_factors(
        cls,
        group: dict[str, Any],
        states: States,
        places: Sequence[Place],
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> None:
        """Replace the adapter's weights by the stacked factors; the model's output changes."""
        new = lora_A, lora_B * _columns_scale(group, lora_B)
        for stored, values in zip(_stored_factors(group, states, places), new, strict=True):
            stored.assign(values[places[-1].processes.part(len(values))])

    @property
    def steps_taken(self) -> int:
        """Number of steps of this layer."""
        return self.states[0]["step"]

    @property
    def kept(self) -> dict[str, Any]:
        """State of `lora_A`."""
        return self.states[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole layer."""
        return self.places[-1].rows(self.lora_B), self.lora_A.shape[1]

    def rows_of(self, index: int) -> slice:
        """Return the rows of A, in this process, of a LoRA expert; a shard may have none."""
        own, count = owned_by(self.group["ranks"], index), len(self.lora_A)
        first = self.places[-2].first_row(self.lora_A)
        start, stop = (min(max(row - first, 0), count) for row in (own.start, own.stop))
        return slice(start, stop)

    def factor_gradients(self, blocks: Blocks, far: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `grad A` [R, in] and `grad B` [out, R], in the dtype of the moments."""
        # The columns hold c_i B_i, so grad B_i = c_i times the gradient of the columns.
        grad_A = gradient(self.lora_A).to(self.states[0]["exp_avg"].dtype)
        grad_B = gradient(self.lora_B).to(self.states[1]["exp_avg"].dtype)
        return grad_A, grad_B * _columns_scale(self.group, grad_B)

    def factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (m, v) of the stacked A [R, in] and (m, v) of the stacked B [out, R]."""
        first, second = ((state["exp_avg"], state["exp_avg_sq"]) for state in self.states)
        return first, second

    def writes(self, winners: Sequence[int]) -> LayerWrites:
        """Increment the step counters of all experts; list the writes of the winners."""
        for state in (*(tensor.state for tensor in self.dense), *self.states):
            state["step"] += 1
        full = self.has_full and 0 in winners
        # Not strict: a layer without a trained bias has one tensor.
        tensors = [
            TensorWrite(tensor, tensor.adamw_step(decay) if full else None)
            for tensor, decay in zip(
                self.dense, ("weight_decay", "bias_weight_decay"), strict=False
            )
        ]
        won = self._lora_winners(winners)
        if not won:
            return LayerWrites(tensors=tensors)
        ranks, scales = self.group["ranks"], stored_scales(self.group)
        of_A, of_B = self.factor_moments()
        rows = [(self.rows_of(index),) for index in won]
        columns = [(..., own) for own in (owned_by(ranks, index) for index in won)]
        steps = [self._lora_step(index) for index in won]
        slices_A = [
            AdapterSlice(own, of_A[0][own], of_A[1][own], step, 1.0)
            for own, step in zip(rows, steps, strict=True)
        ]
        # The columns hold c_i B_i, so their increment is c_i dB_i.
        slices_B = [
            AdapterSlice(own, of_B[0][own], of_B[1][own], step, scales[index])
            for index, own, step in zip(won, columns, steps, strict=True)
        ]
        stored_A, stored_B = self._stored
        adapters = [AdapterWrite(stored_A, slices_A), AdapterWrite(stored_B, slices_B)]
        return LayerWrites(tensors=tensors, adapters=adapters)


def _stored_factors(
    group: dict[str, Any], states: States, places: Sequence[Place]
) -> list[StoredWeight]:
    """Return A and B with their storage."""
    # They are the last two parameters of the group.
    first = len(group["params"]) - 2
    return [
        StoredWeight(
            parameter,
            states[parameter],
            rounding=rounding_of(parameter, group["weight_rounding"]),
            seed=group["seed"],
            name=parameter_name(group, index),
            place=places[index],
        )
        for index, parameter in enumerate(group["params"][first:], first)
    ]


def stored_scales(group: dict[str, Any]) -> list[float]:
    """Return `c_i = s_i / s` for each expert; the columns of expert i hold `c_i B_i`."""
    return [scaling / group["adapter_scaling"] for scaling in group["scalings"]]


def _columns_scale(group: dict[str, Any], like: Tensor) -> Tensor:
    """Return `c_i` for every column of B, [R]."""
    return per_rank(stored_scales(group), group["ranks"], like)
