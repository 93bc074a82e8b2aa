"""Interface of the executors: torch (`eager.py`) and Triton (`triton/executor.py`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.devices import CanRead, is_host_memory
from molf.core.scores.rules import Winners
from molf.core.step.dense import DenseTensor
from molf.core.step.fidelity import UpdateTally
from molf.core.step.guard import FiniteGuard
from molf.core.step.layer import RoutedLayer


class Owner(NamedTuple):
    """Tensor and term that a partial sum belongs to.

    Attributes:
        layer: Index of the layer.
        expert: Index of the expert.
        part: Index of the tensor: weight 0 and bias 1 of `full`, A 0 and B 1 of a LoRA expert.
        term: Name of the term.
    """

    layer: int
    expert: int
    part: int
    term: str


class ScoreSums(NamedTuple):
    """Partial sums of score terms over this process's tensors, on the device.

    Attributes:
        numbers: [n], one per block of a tensor and term; none for an empty shard.
        owners: Owner of each number.
    """

    numbers: Tensor
    owners: list[Owner]


class Executor(ABC):
    """Runs the operations of a step.

    Args:
        can_read: Whether the host reads a tensor on a device without waiting.
    """

    def __init__(self, can_read: CanRead = is_host_memory) -> None:
        self.can_read = can_read

    @abstractmethod
    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse parameters that this executor does not support, before anything is written.

        Args:
            parameters: Name and parameter of all that step.

        Raises:
            ValueError: The message names the parameter and a remedy.
        """

    @abstractmethod
    def squares(self, tensors: Iterable[tuple[Tensor, torch.dtype]]) -> Tensor:
        """Sum the squares of each tensor, in the dtype that comes with it.

        Returns:
            [n], on the first tensor's device. Infinite or NaN if an element is, or if a square
            overflows.
        """

    @abstractmethod
    def update_moments(self, layers: Sequence[RoutedLayer], guard: FiniteGuard) -> ScoreSums:
        """Update the moments of all experts; change none if `guard` refuses the step.

        8-bit moments are not stored here but in `write`.
        """

    @abstractmethod
    def write(
        self,
        layers: Iterable[tuple[RoutedLayer, Winners]],
        plain: Sequence[DenseTensor],
        guard: FiniteGuard,
        tally: UpdateTally | None,
    ) -> None:
        """Increment step counters; write the winners and the plain tensors.

        Args:
            layers: Layers with their winners.
            plain: Tensors that are not routed; their moments are updated here.
            guard: Guard of this step; the host has read that the step is finite.
            tally: Measures updates lost to rounding, if given.
        """
