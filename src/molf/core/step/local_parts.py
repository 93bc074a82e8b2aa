"""Local parts of sharded units and states, for one step; whole units are used as they are."""

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


class LocalParts(Generic[AnyUnit]):
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
        self.units, self.states, self._sharded_states = list(units), states, states
        self.processes: Processes = ALONE
        self._originals: dict[Tensor, tuple[Tensor, Unit]] = {}  # by local parameter
        if not any(is_sharded(p) for unit in units for p in unit.parameters[:1]):
            return
        self.processes = shards = layout_of(units[0].parameters[0]).shards()
        self.states = defaultdict(dict)
        self.units = [self._local(unit, shards) for unit in units]

    def originals(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters of the model for local ones."""
        return [self._originals[p][0] if p in self._originals else p for p in parameters]

    def store(self) -> None:
        """Write numbers and new tensors to the sharded states; other tensors share their memory."""
        for local, (parameter, unit) in self._originals.items():
            state = self.states[local]
            if not state:
                continue
            sharded = self._sharded_states[parameter]
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    sharded[key] = value
                elif not _shares_memory(sharded.get(key), value):
                    sharded[key] = as_sharded(value, parameter, *unit.cut_of(parameter, key))

    def _local(self, unit: AnyUnit, shards: Shards) -> AnyUnit:
        """Return a unit with the local parts of its parameters, gradients and states."""
        parts = []
        for parameter in unit.parameters:
            part = local_part(parameter)
            part.grad = None if parameter.grad is None else local_part(parameter.grad)
            if parameter in self._sharded_states:
                state = self._sharded_states[parameter]
                self.states[part] = {
                    key: local_part(value) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
            self._originals[part] = parameter, unit
            parts.append(part)
        return unit.located_at(parts, tuple(place_of(p, shards) for p in unit.parameters))


def _shares_memory(sharded: Any, local: Tensor) -> bool:
    """Return whether a tensor is the local part of a sharded one."""
    if not isinstance(sharded, Tensor):
        return False
    part = local_part(sharded)
    return (
        part.data_ptr() == local.data_ptr()
        and part.shape == local.shape
        and part.dtype == local.dtype
    )
