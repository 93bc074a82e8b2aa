"""Units: the routed layer or the single plain tensor that the optimizer updates together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

from torch import Tensor

from molf.core.arithmetic.devices import CanRead
from molf.core.model.groups import parameter_name
from molf.core.step.adapter import AdapterLayer
from molf.core.step.dense import DenseTensor
from molf.core.step.folded import FoldedLayer
from molf.core.step.guard import Guarded
from molf.core.step.layer import RoutedLayer, States
from molf.core.storage.place import WHOLE, Place


class UnitKey(NamedTuple):
    """Index of a unit in the optimizer.

    Attributes:
        group: Number of the parameter group.
        position: Index of the parameter in the group; None for a routed layer (the whole group).
    """

    # Indices, not parameters: accelerate and FSDP2 replace parameters and keep their order.
    group: int
    position: int | None


@dataclass(frozen=True)
class Unit(ABC):
    """A unit with its current parameters.

    Attributes:
        key: Index in the optimizer.
        group: Parameter group, with Python numbers for hyper-parameters.
        parameters: Current parameters; on shards, the local part of each.
        places: Locations of the parameters in the whole tensors; none if all are whole.
    """

    key: UnitKey
    group: dict[str, Any]
    parameters: list[Tensor]
    places: tuple[Place, ...] = ()

    @abstractmethod
    def takes_part(self) -> bool:
        """Return whether the parameters have the gradients that a step needs.

        Raises:
            RuntimeError: Some parameters have a gradient and some have none.
        """

    @abstractmethod
    def gradients(self, states: States) -> list[Guarded]:
        """Return the gradients that a step uses, with the factors that multiply each.

        Creates no state.
        """

    @abstractmethod
    def open(self, states: States, can_read: CanRead) -> RoutedLayer | DenseTensor:
        """Return the layer or tensor that an executor updates; create missing state.

        The result is valid for one step.
        """

    @property
    def located(self) -> tuple[Place, ...]:
        """The location of each parameter."""
        return self.places or (WHOLE,) * len(self.parameters)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and parameter of those with a gradient."""
        number, position = self.key
        for place, parameter in enumerate(self.parameters, position or 0):
            if parameter.grad is not None:
                yield parameter_name(self.group, place, number), parameter

    def located_at(self, parts: list[Tensor], places: tuple[Place, ...]) -> Self:
        """Return the unit with this process's parts of its parameters."""
        return replace(self, parameters=parts, places=places)

    def cut_of(self, parameter: Tensor, key: str) -> tuple[int, int]:
        """Return the dimension that shards cut, and its whole size, of a tensor of the state.

        Args:
            parameter: The sharded parameter.
            key: Key of the tensor in the parameter's state.
        """
        return 0, parameter.shape[0]

    def free_gradients(self) -> None:
        """Set the gradients to None."""
        for parameter in self.parameters:
            parameter.grad = None


class PlainUnit(Unit):
    """One parameter that is not routed: plain AdamW."""

    def takes_part(self) -> bool:
        """Return whether the parameter has a gradient."""
        return self.parameters[0].grad is not None

    def gradients(self, states: States) -> list[Guarded]:
        """Return the parameter's gradient."""
        return [Guarded(self.parameters[0])]

    def open(self, states: States, can_read: CanRead) -> DenseTensor:
        """Return the tensor with its moments and its storage."""
        (parameter,), (number, position) = self.parameters, self.key
        assert position is not None, "a plain unit has a position"
        name = parameter_name(self.group, position, number)
        return DenseTensor(parameter, self.group, states[parameter], name, self.located[0])


class LayerUnit(Unit):
    """A routed layer: all parameters of its group.

    Attributes:
        form: Class that stores the LoRA experts.
    """

    @property
    def form(self) -> type[RoutedLayer]:
        """`FoldedLayer` or `AdapterLayer`."""
        return form_of(self.group)

    def takes_part(self) -> bool:
        """Return whether every expert has its gradient."""
        return self.form.takes_part(self.group)

    def gradients(self, states: States) -> list[Guarded]:
        """Return the gradients of weight and bias, or of the adapter's factors."""
        return self.form.gradients_of(self.group, states)

    def located_at(self, parts: list[Tensor], places: tuple[Place, ...]) -> Self:
        """Return the layer with this process's parts of its parameters."""
        return replace(self, parameters=parts, places=places, group={**self.group, "params": parts})

    def cut_of(self, parameter: Tensor, key: str) -> tuple[int, int]:
        """Return the dimension that shards cut, and its whole size; factors have features."""
        return self.form.cut_of(self.group, parameter, key)

    def read_factors(self, states: States) -> list[tuple[Tensor, Tensor]]:
        """Return copies of (A [r, in], B [out, r]) of each LoRA expert."""
        return self.form.read_factors(self.group, states, self.located)

    def write_factors(self, states: States, lora_A: Tensor, lora_B: Tensor) -> None:
        """Replace the stacked factors A [R, in] and B [out, R]."""
        self.form.write_factors(self.group, states, self.located, lora_A, lora_B)

    def open(self, states: States, can_read: CanRead) -> RoutedLayer:
        """Return the layer in its form."""
        return self.form(self.group, states, can_read, self.located)


def form_of(group: dict[str, Any]) -> type[RoutedLayer]:
    """Return the class that stores the LoRA experts of a routed group."""
    # Only groups of the adapter form have an adapter's scaling.
    return AdapterLayer if group.get("adapter_scaling") is not None else FoldedLayer
