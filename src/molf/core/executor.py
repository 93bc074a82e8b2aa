"""An executor runs the operations of a step: with torch (`eager.py`), or with Triton kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.dense import DenseTensor
from molf.core.devices import CanRead, is_host_memory
from molf.core.fidelity import UpdateTally
from molf.core.guard import FiniteGuard
from molf.core.routed import RoutedLayer

Winners = tuple[int, ...]
"""Indices of a layer's winning experts."""


class ScoreSums(NamedTuple):
    """Sums of score terms, still on the device.

    Attributes:
        numbers: [n], of all tensors or blocks.
        owners: (index of the layer, index of the expert) of each.
    """

    numbers: Tensor
    owners: list[tuple[int, int]]


class Executor(ABC):
    """Runs the operations of a step.

    Args:
        can_read: Whether the host reads a tensor on a device without waiting.
    """

    def __init__(self, can_read: CanRead = is_host_memory) -> None:
        self.can_read = can_read

    @abstractmethod
    def check(self, layers: Sequence[RoutedLayer], plain: Sequence[DenseTensor]) -> None:
        """Refuse tensors that this executor cannot take.

        Raises:
            ValueError: With what to change; nothing was written.
        """

    @abstractmethod
    def squares(self, tensors: Iterable[tuple[Tensor, torch.dtype]]) -> Tensor:
        """Sum the squares of each tensor, computed in the dtype beside it.

        Returns:
            [n], on the first tensor's device. Infinite or NaN where an element is, or where a
            square overflows.
        """

    @abstractmethod
    def update_moments(self, layers: Sequence[RoutedLayer], guard: FiniteGuard) -> ScoreSums:
        """Update the moments of all experts of all layers; where `guard` refuses, change none."""

    @abstractmethod
    def write(
        self,
        layers: Iterable[tuple[RoutedLayer, Winners]],
        plain: Sequence[DenseTensor],
        guard: FiniteGuard,
        tally: UpdateTally | None,
    ) -> None:
        """Count the step for every expert; write the winners' steps and those of plain tensors.

        Args:
            layers: With the winners of each.
            plain: Tensors that are not routed; their moments are updated here.
            guard: Of this step, which is known to be finite now.
            tally: Counts the losses of rounding, if given.
        """
