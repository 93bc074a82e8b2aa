"""Local parts of sharded units and states, lent to a step; whole units are lent as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from molf.core.step.layer import States
from molf.core.step.unit import Unit
from molf.core.storage.collectives import ALONE, Processes, Shards
from molf.core.storage.sharding import as_sharded, is_sharded, layout_of, local_part, place_of

AnyUnit = TypeVar("AnyUnit", bound=Unit)


class Loan(Generic[AnyUnit]):
    """Units, states and gradients of this process, for one step.

    Args:
        units: Units with the parameters of the model.
        states: States of the parameters, sharded as they are.

    Attributes:
        units: The units with local parameters and their places.
        states: States of the local parameters; their tensors share memory with `states`.
        processes: Processes that share the parameters.
    """

    def __init__(self, units: Sequence[AnyUnit], states: States) -> None:
        self.units, self.states, self._all_states = list(units), states, states
        self.processes: Processes = ALONE
        self._own: dict[Tensor, tuple[Tensor, Unit]] = {}  # by local parameter
        if not any(is_sharded(p) for unit in units for p in unit.parameters[:1]):
            return
        self.processes = shards = layout_of(units[0].parameters[0]).shards()
        self.states = defaultdict(dict)
        self.units = [self._local(unit, shards) for unit in units]

    def own(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters of the model for local ones."""
        return [self._own[p][0] if p in self._own else p for p in parameters]

    def settle(self) -> None:
        """Store new tensors of the states as sharded ones, and the numbers."""
        for local, (parameter, unit) in self._own.items():
            state = self.states[local]
            if not state:
                continue
            own = self._all_states[parameter]
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    own[key] = value
                elif not _is_on(own.get(key), value):
                    own[key] = as_sharded(value, parameter, *unit.cut_of(parameter, key))

    def _local(self, unit: AnyUnit, shards: Shards) -> AnyUnit:
        """Return a unit with the local parts of its parameters, gradients and states."""
        parts = []
        for parameter in unit.parameters:
            part = local_part(parameter)
            part.grad = None if parameter.grad is None else local_part(parameter.grad)
            if parameter in self._all_states:
                state = self._all_states[parameter]
                self.states[part] = {key: _local_value(value) for key, value in state.items()}
            self._own[part] = parameter, unit
            parts.append(part)
        return unit.located_at(parts, tuple(place_of(p, shards) for p in unit.parameters))


def _local_value(value: Any) -> Any:
    return local_part(value) if isinstance(value, Tensor) else value


def _is_on(kept: Any, local: Tensor) -> bool:
    """Return whether a sharded tensor has its local part on the memory of a tensor."""
    if not isinstance(kept, Tensor):
        return False
    part = local_part(kept)
    return (
        part.data_ptr() == local.data_ptr()
        and part.shape == local.shape
        and part.dtype == local.dtype
    )
