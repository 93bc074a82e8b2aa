"""A unit is what steps together: a routed layer, or one tensor that is not routed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from molf.core.adapter import AdapterLayer
from molf.core.dense import DenseTensor
from molf.core.devices import CanRead
from molf.core.folded import FoldedLayer
from molf.core.groups import parameter_name
from molf.core.guard import Guarded
from molf.core.routed import RoutedLayer, States


class UnitKey(NamedTuple):
    """Names a unit of an optimizer, also after libraries have swapped its parameters.

    Attributes:
        group: Number of the parameter group.
        position: Of the parameter in the group; None of a routed layer, which is the whole group.
    """

    group: int
    position: int | None


@dataclass(frozen=True)
class Unit(ABC):
    """A unit with its parameters of the moment.

    Attributes:
        key: Its name in the optimizer.
        group: Its parameter group, with Python numbers for hyper-parameters.
        parameters: Its parameters.
    """

    key: UnitKey
    group: dict[str, Any]
    parameters: list[Tensor]

    @abstractmethod
    def takes_part(self) -> bool:
        """Whether the parameters have the gradients that a step needs.

        Raises:
            RuntimeError: Some have one and some lack one, so that no step can be taken.
        """

    @abstractmethod
    def gradients(self, states: States) -> list[Guarded]:
        """The gradients that a step uses, and what is made of each; makes no state."""

    @abstractmethod
    def open(self, states: States, can_read: CanRead) -> RoutedLayer | DenseTensor:
        """Return what an executor works on, for the length of one step; makes missing state."""

    def free_gradients(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


class PlainUnit(Unit):
    """One parameter that takes plain AdamW steps."""

    def takes_part(self) -> bool:
        """Whether it has a gradient."""
        return self.parameters[0].grad is not None

    def gradients(self, states: States) -> list[Guarded]:
        """Its gradient."""
        return [Guarded(self.parameters[0])]

    def open(self, states: States, can_read: CanRead) -> DenseTensor:
        """The tensor with its moments and its storage."""
        (parameter,), (number, position) = self.parameters, self.key
        assert position is not None, "a plain unit has a position"
        name = parameter_name(self.group, position, number)
        return DenseTensor(parameter, self.group, states[parameter], name)


class LayerUnit(Unit):
    """A routed layer: all parameters of its group.

    Attributes:
        form: Where the LoRA experts live.
    """

    @property
    def form(self) -> type[RoutedLayer]:
        """The class of the form: folded, or slices of an adapter."""
        return form_of(self.group)

    def takes_part(self) -> bool:
        """Whether the experts have the gradients that they need."""
        return self.form.takes_part(self.group)

    def gradients(self, states: States) -> list[Guarded]:
        """Of the weight and the bias, or of the adapter's factors."""
        return self.form.gradients_of(self.group, states)

    def open(self, states: States, can_read: CanRead) -> RoutedLayer:
        """The layer in its form."""
        return self.form.open(self.group, states, can_read)


def form_of(group: dict[str, Any]) -> type[RoutedLayer]:
    """Return the form of a routed group: where the LoRA experts live.

    They are state of the weight (folded), or slices of a PEFT adapter, which has a scaling.
    """
    return AdapterLayer if group.get("adapter_scaling") is not None else FoldedLayer
