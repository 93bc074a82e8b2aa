"""Storage of a step's float32 values in a parameter of any dtype.

A bfloat16 parameter is written in one of three ways: "exact" (bfloat16 in the parameter, the low 16
bits in the state), "stochastic" (unbiased rounding) or "nearest".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from molf.core.storage.place import WHOLE, Place
from molf.core.storage.rounding import RoundingKey, join_float32, round_stochastic, split_float32
from molf.core.warn import warn

LOW = "low"  # key of the low halves in a parameter's state


def rounding_of(parameter: Tensor, weight_rounding: str | None) -> str:
    """Return how a parameter is written: "none" (as computed), or one of the three roundings."""
    if parameter.dtype.itemsize >= 4:
        return "none"
    if parameter.dtype != torch.bfloat16:
        return "nearest"
    return weight_rounding or "exact"


def check_rounding(parameters: Iterable[Tensor], weight_rounding: str | None) -> None:
    """Refuse a rounding that does not apply to the parameters' dtypes.

    Frozen parameters may have any dtype; bfloat16 ones may be trained later.

    Raises:
        ValueError: With the remedy.
    """
    if weight_rounding is None:
        return
    dtypes = {p.dtype for p in parameters if p.requires_grad or p.dtype == torch.bfloat16}
    low = {dtype for dtype in dtypes if dtype.itemsize < 4}
    if not low:
        found = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(
            f"weight_rounding={weight_rounding!r} has nothing to round: the trained weights are "
            f"{found or 'none'}. Load the model in bfloat16, or leave weight_rounding out."
        )
    other = low - {torch.bfloat16}
    if other and weight_rounding != "nearest":
        raise ValueError(
            f"weight_rounding={weight_rounding!r} is for bfloat16 weights, and some are "
            f"{next(iter(other))}. Load the model in bfloat16."
        )


def warn_of_nearest(roundings: Iterable[tuple[Tensor, str | None]]) -> None:
    """Warn of trained weights that are rounded to nearest.

    Args:
        roundings: Parameters, each with its `weight_rounding`.
    """
    nearest = {
        p.dtype
        for p, rounding in roundings
        if p.requires_grad and rounding_of(p, rounding) == "nearest"
    }
    for dtype in nearest:
        way_out = "Leave weight_rounding out: bfloat16 weights are then exact."
        if dtype != torch.bfloat16:
            way_out = "Load the model in bfloat16, whose weights can be exact, or in float32."
        warn(
            f"Trained weights are {dtype} and rounded to nearest, so small updates are lost (at lr "
            f"2e-5, most of them). {way_out}"
        )


class StoredWeight:
    """Reads and writes a parameter as float32 values, in blocks of rows.

    Args:
        parameter: Any floating-point dtype.
        state: State of the parameter; missing low halves are created.
        rounding: Result of `rounding_of`.
        seed: Seed of stochastic rounding, with the name and the step counter.
        name: Name of the parameter.
        place: Location in the whole parameter; stochastic draws depend on the index there.
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
        # Zeros: the weight starts as its bfloat16 value.
        if rounding == "exact" and LOW not in state:
            state[LOW] = torch.zeros_like(parameter, dtype=torch.int16)

    def read(self, rows: slice | EllipsisType = ...) -> Tensor:
        """Return a block in float32; a view of the parameter if it has that dtype."""
        part = self.parameter.detach()[rows]
        if self.rounding == "none":
            return part
        if self.rounding == "exact":
            return _joined(part, self._state[LOW][rows])
        return part.float()

    def write(self, rows: slice | EllipsisType, values: Tensor) -> None:
        """Store a block that `read` returned and that was changed in place."""
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
        """Replace all values, outside a step; without stochastic rounding."""
        if self.rounding == "exact":
            self.write(..., values.to(self.parameter.device, torch.float32))
        else:
            self.parameter.detach().copy_(values)

    def first_index(self, rows: slice | EllipsisType = ...) -> int:
        """Return the index, in the whole parameter, of a block's first element."""
        parameter = self.parameter
        if parameter.dim() == 0 or not parameter.numel():
            return 0
        first = self._place.first_row(parameter) + (0 if rows is ... else rows.start)
        return first * (parameter.numel() // len(parameter))

    @property
    def low(self) -> Tensor | None:
        """Low halves, int16; None unless rounding is exact."""
        return self._state[LOW] if self.rounding == "exact" else None

    def step_key(self) -> RoundingKey:
        """Return the key of this step's stochastic draws; call it after `step` was incremented."""
        if self._key is None:
            self._key = RoundingKey.of(self._seed, self.name, self._state["step"])
        return self._key


def stored_values(parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """Return a copy of a parameter's values in float32 or float64; create no state."""
    if parameter.dtype == torch.bfloat16 and LOW in state:
        low = state[LOW].to(parameter.device)  # an offloaded state is in host memory
        return _joined(parameter.detach(), low)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True)


def fold_low(parameter: Tensor, low: Tensor) -> bool:
    """Join saved low halves with a parameter that is no longer bfloat16.

    Args:
        parameter: Float32 or float64, with the values of the bfloat16 weight.
        low: Low halves, int16, of the parameter's shape and on its device.

    Returns:
        Whether the parameter has the joined values; one with other values stays unchanged.
    """
    stored = parameter.detach()
    high, _ = split_float32(stored.float())
    values = _joined(high, low).to(stored.dtype)
    # Only if the weight still has the values that the low halves belong to.
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
    """Return `join_float32`, also for a parameter that something else has set to zero."""
    # If something else replaced the high half, the old low half adds at most half a unit in the
    # last place. Zero is the exception: with a negative low half its bits are those of a NaN.
    high = high.resolve_neg()  # a negated view has other bits than its values
    return join_float32(high, torch.where(high == 0, low.clamp(min=0), low))
