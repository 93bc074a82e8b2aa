"""A dense tensor in a step: parameter, storage and moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep, real_view
from molf.core.storage.moments import Moments, moment_state, moments_of
from molf.core.storage.place import WHOLE, Place
from molf.core.storage.weights import StoredWeight, rounding_of


class DenseTensor:
    """A weight, bias, embedding or norm with a gradient, for one step.

    Args:
        parameter: The parameter.
        group: Parameter group.
        state: State of the parameter; created if it is empty.
        name: Name of the parameter.
        place: Location of the parameter in the whole tensor.

    Attributes:
        values: The parameter; of a complex one the real and imaginary parts, [..., 2].
        stored: Storage of the values.
        moments: Storage of the moments.
    """

    def __init__(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        state: dict[str, Any],
        name: str,
        place: Place = WHOLE,
    ) -> None:
        self.parameter, self.group, self.state, self.place = parameter, group, state, place
        self.values = values = real_view(parameter)
        if "step" not in state:
            state.update(moment_state(values, group["state_dtype"], place))
        self.stored = StoredWeight(
            values,
            state,
            rounding=rounding_of(values, group["weight_rounding"]),
            seed=group["seed"],
            name=name,
            place=place,
        )
        self.moments: Moments = moments_of(state)
        # Fused kernels would access memory out of bounds.
        other = next((x for x in self.moments.shapes if x != values.shape), None)
        if other is not None:
            raise RuntimeError(
                f"A moment of {name} has shape {tuple(other)}, the parameter has "
                f"{tuple(values.shape)}: one of them was replaced. Drop the old state with "
                "optimizer.state.pop(parameter), or give it the new shape."
            )

    def adamw_step(self, weight_decay: str = "weight_decay") -> AdamWStep:
        """Return the AdamW scalars of the current step; `weight_decay` is the group's key."""
        group = self.group
        return AdamWStep(
            group["lr"], group[weight_decay], group["betas"], group["eps"], self.state["step"]
        )

    @property
    def is_plain(self) -> bool:
        """Whether values and moments are stored in the dtype of the arithmetic."""
        return self.stored.rounding == "none" and self.moments.is_settled
