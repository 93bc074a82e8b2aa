"""How a parameter holds the values that a step computes.

Steps are computed in float32 (float64 for float64 parameters). A bfloat16 parameter holds the upper
half of such a value: with `weight_rounding="exact"` the optimizer's state has the lower half, so
that the two are the float32 value; `"stochastic"` rounds without bias; `"nearest"` loses what is
smaller than half a unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from molf.core.place import WHOLE, Place
from molf.core.rounding import RoundingKey, join_float32, round_stochastic, split_float32
from molf.core.warn import warn

LOW = "low"  # key of the lower halves in a parameter's state


def rounding_of(parameter: Tensor, weight_rounding: str | None) -> str:
    """Return how a parameter is written: `"none"` where it holds what is computed."""
    if parameter.dtype.itemsize >= 4:
        return "none"
    if parameter.dtype != torch.bfloat16:
        return "nearest"
    return weight_rounding or "exact"


def check_rounding(parameters: Iterable[Tensor], weight_rounding: str | None) -> None:
    """Refuse a rounding that was asked for where it cannot be had.

    Raises:
        ValueError: With what to change.
    """
    if weight_rounding is None:
        return
    dtypes = {parameter.dtype for parameter in parameters}
    low = {dtype for dtype in dtypes if dtype.itemsize < 4}
    if not low:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"weight_rounding={weight_rounding!r} has nothing to round: what is trained is "
            f"{found}. Load the model in bfloat16, or leave weight_rounding out."
        )
    other = low - {torch.bfloat16}
    if other and weight_rounding != "nearest":
        raise ValueError(
            f"weight_rounding={weight_rounding!r} is for bfloat16 weights, and some are "
            f"{next(iter(other))}. Load the model in bfloat16."
        )


def warn_of_nearest(roundings: Iterable[tuple[Tensor, str | None]]) -> None:
    """Warn of weights that are rounded to nearest.

    Args:
        roundings: Parameters, each with its `weight_rounding`.
    """
    nearest = {p.dtype for p, rounding in roundings if rounding_of(p, rounding) == "nearest"}
    for dtype in nearest:
        way_out = "Leave weight_rounding out: bfloat16 weights are then exact."
        if dtype != torch.bfloat16:
            way_out = "Load the model in bfloat16, whose weights can be exact, or in float32."
        warn(
            f"Trained weights are {dtype} and rounded to nearest, so small updates are lost (at lr "
            f"2e-5, most of them). {way_out}"
        )


class StoredWeight:
    """A parameter, read and written in blocks of rows as the float32 values that it stands for.

    Args:
        parameter: Any floating-point dtype.
        state: Its state; the lower halves are made here where they are needed and missing.
        rounding: Of `rounding_of`.
        seed: With the name and the step counter, what stochastic draws depend on.
        name: The parameter's name.
        place: Which part of the whole parameter it is: draws depend on the index in the whole.
    """

    def __init__(
        self,
        parameter: Tensor,
        state: dict[str, Any],
        *,
        rounding: str,
        seed: int,
        name: str,
        place: Place = WHOLE,
    ) -> None:
        self.parameter = parameter
        self.rounding = rounding
        self.name = name
        self._state = state
        self._seed = seed
        self._place = place
        self._key: RoundingKey | None = None
        if rounding == "exact" and LOW not in state:
            state[LOW] = torch.zeros_like(parameter, dtype=torch.int16)

    def read(self, rows: slice | EllipsisType = ...) -> Tensor:
        """Return a block's values; where the parameter holds them, a view on it."""
        part = self.parameter.detach()[rows]
        if self.rounding == "none":
            return part
        if self.rounding == "exact":
            return _joined(part, self._state[LOW][rows])
        return part.float()

    def write(self, rows: slice | EllipsisType, values: Tensor) -> None:
        """Store a block's values, which `read` has returned and the step has changed in place."""
        if self.rounding == "none":
            return
        part = self.parameter.detach()[rows]
        if self.rounding == "exact":
            high, low = split_float32(values)
            part.copy_(high)
            self._state[LOW][rows].copy_(low)
        elif self.rounding == "stochastic":
            part.copy_(round_stochastic(values, self.step_key(), self.first_index(rows)))
        else:
            part.copy_(values)

    def assign(self, values: Tensor) -> None:
        """Replace all values from outside a step: as exactly as the parameter can hold them."""
        if self.rounding == "exact":
            self.write(..., values.to(self.parameter.device, torch.float32))
        else:
            self.parameter.detach().copy_(values)

    def first_index(self, rows: slice | EllipsisType = ...) -> int:
        """Index in the whole parameter of a block's first element."""
        parameter = self.parameter
        if parameter.dim() == 0 or not parameter.numel():
            return 0
        first = self._place.first_row(parameter) + (0 if rows is ... else rows.start)
        return first * (parameter.numel() // len(parameter))

    @property
    def low(self) -> Tensor | None:
        """The lower halves, where rounding is exact."""
        return self._state[LOW] if self.rounding == "exact" else None

    def step_key(self) -> RoundingKey:
        """Return what decides this step's stochastic draws; the counter has moved already."""
        if self._key is None:
            self._key = RoundingKey.of(self._seed, self.name, self._state["step"])
        return self._key


def stored_values(parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a copy of the values that a parameter stands for; makes no state."""
    if parameter.dtype == torch.bfloat16 and LOW in state:
        low = state[LOW].to(parameter.device)  # an offloaded state is elsewhere
        return _joined(parameter.detach(), low)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def fold_low(parameter: Tensor, low: Tensor) -> bool:
    """Add the lower halves of a bfloat16 weight to a parameter of another dtype with its values.

    Args:
        parameter: Not of bfloat16.
        low: The lower halves, of the parameter's shape and on its device.

    Returns:
        Whether it has the float32 values now; one that had other values stays as it is.
    """
    stored = parameter.detach()
    high, _ = split_float32(stored.float())
    values = _joined(high, low).to(stored.dtype)
    if torch.equal(high.to(stored.dtype), stored):
        stored.copy_(values)
    return torch.equal(stored, values)


def join_in_place(parameters: Iterable[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Turn bfloat16 parameters into their float32 values, on the device of their lower halves.

    The lower halves leave the state, one parameter after the other.
    """
    for parameter in parameters:
        state = states.get(parameter) or {}
        if parameter.dtype != torch.bfloat16 or LOW not in state:
            continue
        low = state.pop(LOW)
        high = parameter.detach().to(low.device)
        parameter.data = stored_values(high, {LOW: low})  # the same object, so that ties stay


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """`join_float32`, also of a parameter that something else has set to zero meanwhile.

    A low half that has lost its high half is at most half a unit in the last place of whatever
    stands there now. Only below zero itself there is nothing but NaN.
    """
    high = high.resolve_neg()  # whose bits are the values'
    return join_float32(high, torch.where(high == 0, low.clamp(min=0), low))
