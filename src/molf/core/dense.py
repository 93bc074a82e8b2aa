"""A dense tensor in a step: a weight, bias, embedding or norm, its storage and its moments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from molf.core.adam import AdamWStep
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
        if "step" not in state:
            state.update(moment_state(parameter, group["state_dtype"], place))
        self.stored = StoredWeight(
            parameter,
            state,
            rounding=rounding_of(parameter, group["weight_rounding"]),
            seed=group["seed"],
            name=name,
            place=place,
        )
        self.moments: Moments = moments_of(state)

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
