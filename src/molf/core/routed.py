"""A routed layer in a step: a form of it says which tensors its experts have."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molf.core.adam import AdamWStep, finish_score
from molf.core.blocks import Blocks
from molf.core.config import lora_expert_names
from molf.core.dense import DenseTensor
from molf.core.devices import CanRead
from molf.core.groups import parameter_name
from molf.core.guard import Guarded
from molf.core.operations import LayerWrites
from molf.core.place import WHOLE, Place
from molf.core.routing import Decision, select_winners

States = dict[Tensor, dict[str, Any]]
"""The optimizer's state, by parameter."""


class RoutedLayer(ABC):
    """One routed layer for the length of one optimizer step.

    Made from a parameter group and the states of its parameters. A form says where the experts'
    factors, gradients and moments are, and lists the writes of the winners; an executor does the
    arithmetic.

    Attributes:
        group: The layer's parameter group.
        name: The layer's name in the model.
        dense: The tensors of the `full` expert that have a gradient; the weight comes first. Empty
            where the base is frozen.
        gradients: The gradients that this step uses, and what is made of each.
        experts: Names of all experts, in the order that breaks ties.
    """

    def __init__(
        self,
        group: dict[str, Any],
        states: States,
        dense: list[DenseTensor],
        place: Place = WHOLE,
    ) -> None:
        self.group = group
        self.place = place
        self.name: str = group["layer"]
        self.dense = dense
        self.gradients = self.gradients_of(group, states)
        names = lora_expert_names(group["ranks"])
        self.experts = ("full", *names) if dense else names

    @classmethod
    @abstractmethod
    def open(cls, group: dict[str, Any], states: States, can_read: CanRead) -> RoutedLayer:
        """Return the layer of a group; state that is missing is made.

        Args:
            group: The layer's parameter group.
            states: Of its parameters.
            can_read: Whether the host reads a tensor on a device without waiting.
        """

    @classmethod
    @abstractmethod
    def takes_part(cls, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group have the gradients that a step needs."""

    @classmethod
    @abstractmethod
    def gradients_of(cls, group: dict[str, Any], states: States) -> list[Guarded]:
        """The gradients that a step of a group uses, and what is made of each; makes no state."""

    @classmethod
    @abstractmethod
    def read_factors(cls, group: dict[str, Any], states: States) -> list[tuple[Tensor, Tensor]]:
        """Copies of (A [r, in], B [out, r]) of each LoRA expert, as the paper scales them."""

    @classmethod
    @abstractmethod
    def write_factors(
        cls, group: dict[str, Any], states: States, lora_A: Tensor, lora_B: Tensor
    ) -> None:
        """Replace the stacked factors, A [R, in] and B [out, R], as the paper scales them."""

    @property
    @abstractmethod
    def steps_taken(self) -> int:
        """How many steps this layer has taken."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`out` and `in` of the layer."""

    @abstractmethod
    def factor_gradients(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """`grad A` [R, in] and `grad B` [out, R] of the stacked factors, in the state's dtype."""

    @abstractmethod
    def factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`exp_avg` and `exp_avg_sq` of the stacked A, and of the stacked B."""

    @abstractmethod
    def writes(self, winners: Sequence[int]) -> LayerWrites:
        """Count the step for every expert; list the writes of the winners.

        Every write starts from the values before the step. Memory of products is allocated here.

        Args:
            winners: Indices of the experts.
        """

    @property
    def has_full(self) -> bool:
        """Whether expert 0 is `full`."""
        return bool(self.dense)

    @property
    def lora_lrs(self) -> tuple[float, ...]:
        """Scheduled rate of each LoRA expert."""
        return tuple(self.group["lr"] * ratio for ratio in self.group["lora_lr_ratios"])

    def decide(self, sums: Sequence[float]) -> tuple[tuple[int, ...], Decision]:
        """Choose the winners from the score sums, now on the host.

        Raises:
            RuntimeError: A score is not finite.
        """
        scores = self.scores(sums)
        by_name = dict(zip(self.experts, scores, strict=True))
        if not all(map(math.isfinite, scores)):
            raise RuntimeError(
                f"Scores of layer {self.name} are not finite although its gradient is: {by_name}. "
                "Its moments are not, which no step has done: was the state loaded or written?"
            )
        winners = select_winners(
            scores,
            score=self.group["score"],
            top_k=self.group["top_k"],
            has_full=self.has_full,
            layer=self.name,
            step=self.steps_taken,
            seed=self.group["seed"],
        )
        return winners, Decision(tuple(self.experts[winner] for winner in winners), by_name)

    def scores(self, sums: Sequence[float]) -> list[float]:
        """Turn the score sums, now on the host, into one score per expert."""
        width = sum(self.shape)
        counts = [rank * width for rank in self.group["ranks"]]
        lrs = list(self.lora_lrs)
        if self.has_full:
            counts.insert(0, sum(self.place.count(tensor.parameter) for tensor in self.dense))
            lrs.insert(0, self.group["lr"])
        return [
            finish_score(total, score=self.group["score"], lr=lr, count=count)
            for total, lr, count in zip(sums, lrs, counts, strict=True)
        ]

    def _lora_step(self, index: int) -> AdamWStep:
        group = self.group
        return AdamWStep(
            self.lora_lrs[index],
            group["lora_weight_decays"][index],
            group["betas"],
            group["eps"],
            self.steps_taken,
        )

    def _lora_winners(self, winners: Sequence[int]) -> list[int]:
        """Indices of the winners among the LoRA experts."""
        return [w - self.has_full for w in winners if w >= self.has_full]


def dense_tensors(
    group: dict[str, Any], parameters: Sequence[Tensor], states: States, place: Place = WHOLE
) -> list[DenseTensor]:
    """The dense tensors of a routed group that have a gradient; the weight is first of all."""
    return [
        DenseTensor(parameter, group, states[parameter], parameter_name(group, index), place)
        for index, parameter in enumerate(parameters)
        if parameter.grad is not None
    ]
