"""Base class of a routed layer; `folded.py` and `adapter.py` implement its two forms."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.blocks import Blocks
from molf.core.arithmetic.devices import CanRead, is_host_memory
from molf.core.config import lora_expert_names
from molf.core.hyper_parameters import storable
from molf.core.model.factors import owned_by
from molf.core.model.groups import parameter_name
from molf.core.scores.checks import ScoreError, value_of
from molf.core.scores.registry import routing
from molf.core.scores.rules import Candidates
from molf.core.scores.score import Expert, Part, Score
from molf.core.step.dense import DenseTensor
from molf.core.step.guard import Guarded
from molf.core.step.operations import LayerWrites
from molf.core.storage.collectives import Cut, Processes
from molf.core.storage.place import WHOLE, Place

States = dict[Tensor, dict[str, Any]]
"""State of the optimizer, by parameter."""


class RoutedLayer(ABC):
    """One routed layer for the length of one optimizer step.

    A subclass (form) returns the experts' factors, gradients and moments and lists the writes of
    the winners. An executor computes.

    Args:
        group: Parameter group of the layer.
        states: States of its parameters; missing ones are created.
        can_read: Whether the host reads a tensor on a device without waiting.
        places: Locations of its parameters in the whole tensors; none if all are whole.

    Attributes:
        group: Parameter group of the layer.
        places: Locations of its parameters.
        name: Name of the layer in the model.
        dense: Tensors of the `full` expert with a gradient, weight first. Empty for a frozen base.
        gradients: Gradients that this step uses, with the factors that multiply each.
        experts: Names of all experts, in the order that breaks ties.
    """

    def __init__(
        self,
        group: dict[str, Any],
        states: States,
        can_read: CanRead = is_host_memory,
        places: Sequence[Place] = (),
    ) -> None:
        self.group = group
        self.places = places or (WHOLE,) * len(group["params"])
        self.name: str = group["layer"]
        self.dense = self._open(states, can_read)
        self.gradients = self.gradients_of(group, states)
        names = lora_expert_names(group["ranks"])
        self.experts = ("full", *names) if self.dense else names

    @abstractmethod
    def _open(self, states: States, can_read: CanRead) -> list[DenseTensor]:
        """Find the layer's tensors, and create missing state; return `dense`."""

    @classmethod
    @abstractmethod
    def takes_part(cls, group: dict[str, Any]) -> bool:
        """Return whether the parameters of a group have the gradients that a step needs."""

    @classmethod
    @abstractmethod
    def gradients_of(cls, group: dict[str, Any], states: States) -> list[Guarded]:
        """Return the gradients that a step uses, with the factors that multiply each.

        Creates no state.
        """

    @classmethod
    @abstractmethod
    def read_factors(
        cls, group: dict[str, Any], states: States, places: Sequence[Place]
    ) -> list[tuple[Tensor, Tensor]]:
        """Return copies of (A [r, in], B [out, r]) of each LoRA expert, in the paper's scale.

        They are whole: every process that shares the layer must call it.
        """

    @classmethod
    @abstractmethod
    def write_factors(
        cls,
        group: dict[str, Any],
        states: States,
        places: Sequence[Place],
        lora_A: Tensor,
        lora_B: Tensor,
    ) -> None:
        """Replace the stacked factors, whole A [R, in] and B [out, R], in the paper's scale."""

    @classmethod
    def cut_of(cls, group: dict[str, Any], parameter: Tensor, key: str) -> tuple[int, int]:
        """Return the dimension that shards cut, and its whole size, of a tensor of the state.

        Args:
            group: Parameter group with sharded parameters.
            parameter: One of them.
            key: Key of the tensor in its state.
        """
        return 0, parameter.shape[0]

    @property
    @abstractmethod
    def steps_taken(self) -> int:
        """Number of steps of this layer."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the whole layer."""

    @property
    def processes(self) -> Processes:
        """Processes that share the layer."""
        return self.places[0].processes

    @property
    def far_factor(self) -> Cut | None:
        """This process's part of the factor that a gradient on its shard needs whole.

        The rows of a shard of G and of one factor are cut alike; the product with the other factor,
        and the gradient of it, need all of its features. None: autograd makes the gradients.
        """
        return None

    @property
    def far_part(self) -> int:
        """Index of the far factor: 0 for A, 1 for B."""
        return 0

    @abstractmethod
    def factor_gradients(self, blocks: Blocks, far: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `grad A` [R, in] and `grad B` [out, R], in the dtype of the state.

        Args:
            blocks: Sizes of blocks.
            far: The whole far factor, on shards. Its gradient is then this shard's term of a sum.
        """

    def rows_of(self, index: int) -> slice:
        """Return the rows of A, in this process, of a LoRA expert."""
        return owned_by(self.group["ranks"], index)

    @abstractmethod
    def factor_moments(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (m, v) of the stacked A [R, in] and (m, v) of the stacked B [out, R]."""

    @abstractmethod
    def writes(self, winners: Sequence[int]) -> LayerWrites:
        """Increment the step counters of all experts; list the writes of the winners.

        Every write starts from the values before the step. Operands of products are allocated here.

        Args:
            winners: Indices of the winning experts.
        """

    @property
    def has_full(self) -> bool:
        """Whether expert 0 is `full`."""
        return bool(self.dense)

    @property
    def lora_lrs(self) -> tuple[float, ...]:
        """Scheduled learning rate of each LoRA expert."""
        return tuple(self.group["lr"] * ratio for ratio in self.group["lora_lr_ratios"])

    @property
    def score(self) -> Score:
        """Score of the experts."""
        return routing(self.group["score"]).score

    @property
    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """State that holds the numbers of a score that keeps some."""

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(expert, tensor) of all tensors, as in `Owner`."""
        full = [(0, part) for part in range(len(self.dense))]
        first, count = int(self.has_full), len(self.group["ranks"])
        return full + [(first + index, part) for index in range(count) for part in (0, 1)]

    def candidates(self, sums: Mapping[tuple[int, int, str], float]) -> Candidates:
        """Return the scores of the experts, for the choice of the winners.

        Args:
            sums: Sum of each term over each tensor, by (expert, part, term).

        Raises:
            RuntimeError: A score is not finite, or its function failed.
        """
        score = self.score
        scores = [self._value(score, expert) for expert in self._experts_of(score, sums)]
        group = self.group
        return Candidates(
            self.name, scores, self.has_full, group["top_k"], self.steps_taken, group["seed"]
        )

    def _experts_of(
        self, score: Score, sums: Mapping[tuple[int, int, str], float]
    ) -> Iterator[Expert]:
        """Yield the experts as a score reads them."""
        group, shape = self.group, self.shape
        terms = [term.name for term in score.terms]

        def part(name: str, size: int, expert: int, place: int) -> Part:
            return Part(name, size, {term: sums[expert, place, term] for term in terms})

        if self.has_full:
            parts = tuple(
                part(name, tensor.place.count(tensor.parameter), 0, place)
                # Not strict: a layer without a trained bias has one tensor.
                for place, (name, tensor) in enumerate(
                    zip(("weight", "bias"), self.dense, strict=False)
                )
            )
            yield Expert("full", None, group["lr"], 1.0, shape, parts, self._kept_by(score, "full"))
        out_features, in_features = shape
        numbers = zip(group["ranks"], self.lora_lrs, group["scalings"], strict=True)
        for index, (rank, lr, scaling) in enumerate(numbers, int(self.has_full)):
            parts = (
                part("lora_A", rank * in_features, index, 0),
                part("lora_B", rank * out_features, index, 1),
            )
            name = self.experts[index]
            yield Expert(name, rank, lr, scaling, shape, parts, self._kept_by(score, name))

    def _kept_by(self, score: Score, expert: str) -> dict[str, float]:
        """Return the numbers that a score keeps for an expert."""
        state = self.kept if score.kept else {}
        return {
            name: state.get(f"score_{expert}_{name}", start) for name, start in score.kept.items()
        }

    def _value(self, score: Score, expert: Expert) -> float:
        """Return the score of an expert; store the numbers that the score keeps."""
        where = f"score={score.name}, expert {expert.name} of layer {self.name}"
        wrong = [
            f"{name} of {part.name}"
            for part in expert.parts
            for name, total in part.sums.items()
            if not math.isfinite(total)
        ]
        if wrong:
            raise ScoreError(
                f"Scores of layer {self.name} are not finite although its gradient is: "
                f"{', '.join(wrong)} of expert {expert.name} (score={score.name}). Its moments are "
                "not finite, or a term overflows. No step writes such moments: was the state "
                "loaded or changed?"
            )
        try:
            value = value_of(score, expert)
        except ScoreError as error:
            raise ScoreError(f"{where}: {error}") from error.__cause__
        if not all(map(math.isfinite, (value, *expert.kept.values()))):
            raise ScoreError(
                f"{where}: its function returned {value} (kept: {expert.kept}) although all of its "
                "sums are finite."
            )
        for name, number in expert.kept.items():
            # NumPy's numbers would not load with `weights_only=True`.
            self.kept[f"score_{expert.name}_{name}"] = storable(number)
        return value

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
        """Return the LoRA indices of the winners; `full` is left out."""
        return [w - self.has_full for w in winners if w >= self.has_full]


def dense_tensors(
    group: dict[str, Any],
    parameters: Sequence[Tensor],
    states: States,
    places: Sequence[Place],
) -> list[DenseTensor]:
    """Return the dense tensors of a routed group that have a gradient, weight first."""
    return [
        DenseTensor(parameter, group, states[parameter], parameter_name(group, index), place)
        # Not strict: the adapter's factors come last.
        for index, (parameter, place) in enumerate(zip(parameters, places, strict=False))
        if parameter.grad is not None
    ]
