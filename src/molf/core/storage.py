"""How a parameter holds the values that a step computes.

Steps are computed in float32 (float64 for float64 parameters). A bfloat16 parameter holds the upper
half of such a value: with `weight_rounding="exact"` the optimizer's state has the lower half, so
that the two are the float32 value; `"stochastic"` rounds without bias; `"nearest"` loses what is
smaller than half a unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from molf.core.names import ROUNDINGS
from molf.core.rounding import RoundingKey, join_float32, round_stochastic, split_float32

LOW = "low"  # key of the lower halves in a parameter's state


def rounding_of(parameter: Tensor, weight_rounding: str | None) -> str:
    """Return how a parameter is written: `"none"` where it holds what is computed."""
    if parameter.dtype.itemsize >= 4:
        return "none"
    if parameter.dtype != torch.bfloat16:
        return "nearest"
    return weight_rounding or "exact"


def check_known_rounding(weight_rounding: str | None) -> None:
    """Refuse a word that names no rounding.

    Raises:
        ValueError: With what is allowed.
    """
    if weight_rounding not in (None, *ROUNDINGS):
        allowed = ", ".join(map(repr, ROUNDINGS))
        raise ValueError(f"Invalid weight_rounding={weight_rounding!r}. Must be {allowed} or None.")


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


class StoredWeight:
    """A parameter, read and written in blocks of rows as the float32 values that it stands for.

    Args:
        parameter: Any floating-point dtype.
        state: Its state; the lower halves are made here where they are needed and missing.
        rounding: Of `rounding_of`.
        seed: With the name and the step counter, what stochastic draws depend on.
        name: The parameter's name.
    """

    def __init__(
        self, parameter: Tensor, state: dict[str, Any], *, rounding: str, seed: int, name: str
    ) -> None:
        self.parameter = parameter
        self.rounding = rounding
        self.name = name
        self._state = state
        self._seed = seed
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
            first = (
                0 if rows is ... else rows.start * (self.parameter.numel() // len(self.parameter))
            )
            part.copy_(round_stochastic(values, self.step_key(), first))
        else:
            part.copy_(values)

    def assign(self, values: Tensor) -> None:
        """Replace all values from outside a step: as exactly as the parameter can hold them."""
        if self.rounding == "exact":
            self.write(..., values.to(self.parameter.device, torch.float32))
        else:
            self.parameter.detach().copy_(values)

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


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """`join_float32`, also of a parameter that something else has set to zero meanwhile.

    A low half that has lost its high half is at most half a unit in the last place of whatever
    stands there now. Only below zero itself there is nothing but NaN.
    """
    high = high.resolve_neg()  # whose bits are the values'
    return join_float32(high, torch.where(high == 0, low.clamp(min=0), low))
