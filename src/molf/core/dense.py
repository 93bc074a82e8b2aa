"""A dense tensor in a step: a weight, bias, embedding or norm, its storage and its moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from molf.core.adam import AdamWStep, real_view
from molf.core.moments import Moments, moment_state, moments_of
from molf.core.place import WHOLE, Place
from molf.core.storage import StoredWeight, rounding_of


class DenseTensor:
    """A parameter with a gradient, for the length of one step.

    Args:
        parameter: The tensor.
        group: The parameter group that it is in.
        state: Its state; filled here if it is empty.
        name: Its name.
        place: Which part of the whole tensor it is.

    Attributes:
        values: The parameter, or the real and imaginary parts of a complex one, [..., 2].
        stored: How the parameter holds its values.
        moments: Its moments.
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
        other = next((x for x in self.moments.shapes if x != values.shape), None)
        if other is not None:
            raise RuntimeError(
                f"A moment of {name} has shape {tuple(other)}, the parameter has "
                f"{tuple(values.shape)}: one of them was replaced. Drop the old state with "
                "optimizer.state.pop(parameter), or give it the new shape."
            )

    def adamw_step(self, weight_decay: str = "weight_decay") -> AdamWStep:
        """The scalars of the step that the counter says; `weight_decay` names the group's key."""
        group = self.group
        return AdamWStep(
            group["lr"], group[weight_decay], group["betas"], group["eps"], self.state["step"]
        )

    @property
    def is_plain(self) -> bool:
        """Whether values and moments are kept as they are computed."""
        return self.stored.rounding == "none" and self.moments.is_settled
