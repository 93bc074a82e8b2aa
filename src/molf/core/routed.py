"""What a routed layer does in a step, whatever the form in which its LoRA experts live."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

from torch import Tensor

from molf.core.adam import (
    AdamWStep,
    cached_blocks,
    finish_score,
    update_and_score,
    update_and_score_columns,
)
from molf.core.config import lora_expert_names
from molf.core.dense import DenseTensor
from molf.core.factors import owned_by
from molf.core.fidelity import UpdateTally
from molf.core.groups import parameter_name
from molf.core.guard import FiniteGuard, Guarded
from molf.core.routing import Decision, select_winners

States = dict[Tensor, dict[str, Any]]
"""The optimizer's state, by parameter."""


class RoutedLayer(ABC):
    """One routed layer for the length of one optimizer step.

    Made from a parameter group and the states of its parameters. The step calls `update_moments`
    for every layer, reads all scores at once, and then calls `apply`. A form says where the
    experts' tensors, gradients and moments are and how winners move; all else is here.

    Attributes:
        group: The layer's parameter group.
        name: The layer's name in the model.
        dense: The tensors of the `full` expert that have a gradient; the weight comes first. Empty
            where the base is frozen.
        gradients: The gradients that this step uses, and what is made of each.
        experts: Names of all experts, in the order that breaks ties.
    """

    def __init__(self, group: dict[str, Any], states: States, dense: list[DenseTensor]) -> None:
        self.group = group
        self.name: str = group["layer"]
        self.dense = dense
        self.gradients = self.gradients_of(group, states)
        names = lora_expert_names(group["ranks"])
        self.experts = ("full", *names) if dense else names

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

    @abstractmethod
    def _factor_shapes(self) -> tuple[int, int]:
        """`in` and `out` of the layer."""

    @abstractmethod
    def _factor_gradients(self) -> tuple[Tensor, Tensor]:
        """`grad A` [R, in] and `grad B` [out, R] of the stacked factors, in the state's dtype."""

    @abstractmethod
    def _factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """`exp_avg` and `exp_avg_sq` of the stacked A, and of the stacked B."""

    @abstractmethod
    def apply(self, winners: Sequence[int], tally: UpdateTally | None = None) -> None:
        """Count the step for every expert and give the winners theirs, each from the old state.

        Args:
            winners: Indices of the experts.
            tally: Where losses of rounding are counted, if anywhere.
        """

    @property
    def has_full(self) -> bool:
        """Whether expert 0 is `full`."""
        return bool(self.dense)

    @property
    def lora_lrs(self) -> tuple[float, ...]:
        """Scheduled rate of each LoRA expert."""
        return tuple(self.group["lr"] * ratio for ratio in self.group["lora_lr_ratios"])

    def update_moments(self, guard: FiniteGuard) -> list[list[Tensor]]:
        """Update the moments of all experts.

        Returns:
            For each expert the parts of its score's sum, 0-dim, on the device: to add them up is
            the host's work, which has to read them anyway.
        """
        ranks, score = list(self.group["ranks"]), self.group["score"]
        full = [part for tensor in self.dense for part in tensor.update_moments(guard, score)]
        (grad_A, grad_B), (of_A, of_B) = self._factor_gradients(), self._factor_moments()
        decay = guard.decay_of(grad_A.device, of_A[0].dtype, self.group["betas"])
        lora: list[list[Tensor]] = [[] for _ in ranks]
        for index, parts in enumerate(lora):
            own = _part(owned_by(ranks, index), grad_A, *of_A)
            parts += [
                update_and_score(*_part(x, *own), decay, score) for x in cached_blocks(own[0])
            ]
        for rows in cached_blocks(grad_B):
            block = _part(rows, grad_B, *of_B)
            if len(ranks) == 1:
                lora[0].append(update_and_score(*block, decay, score))
                continue
            columns = update_and_score_columns(*block, decay, score).split(ranks)
            for parts, own_columns in zip(lora, columns, strict=True):
                parts.append(own_columns.sum())
        return [full, *lora] if self.has_full else lora

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
        width = sum(self._factor_shapes())
        counts = [rank * width for rank in self.group["ranks"]]
        lrs = list(self.lora_lrs)
        if self.has_full:
            counts.insert(0, sum(tensor.parameter.numel() for tensor in self.dense))
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


def _part(
    rows: slice | EllipsisType, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return grad[rows], exp_avg[rows], exp_avg_sq[rows]


def dense_tensors(
    group: dict[str, Any], parameters: Sequence[Tensor], states: States
) -> list[DenseTensor]:
    """The dense tensors of a routed group that have a gradient; the weight is first of all."""
    return [
        DenseTensor(parameter, group, states[parameter], parameter_name(group, index))
        for index, parameter in enumerate(parameters)
        if parameter.grad is not None
    ]
