"""Rules that choose the winners of all layers from their scores.

A rule knows no score. Draws depend on (seed, layer, step) alone, so that a resumed or differently
sharded run draws the same.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

Winners = tuple[int, ...]
"""Indices of a layer's winning experts, ascending."""


@dataclass(frozen=True)
class Candidates:
    """The experts of one layer in one step.

    Attributes:
        layer: Name of the layer.
        scores: One score per expert, `full` first.
        has_full: Whether expert 0 is `full`.
        top_k: Number of winners.
        step: Number of the layer's steps before this one.
        seed: `MoLFConfig.seed`.
    """

    layer: str
    scores: Sequence[float]
    has_full: bool
    top_k: int
    step: int
    seed: int

    @property
    def best(self) -> Winners:
        """The experts with the highest scores; among equal scores the lowest index wins."""
        return self._highest(range(len(self.scores)), self.top_k)

    @property
    def best_lora(self) -> Winners:
        """The LoRA experts with the highest scores."""
        return self._highest(range(self.has_full, len(self.scores)), self.top_k)

    @property
    def full_and_best_lora(self) -> Winners:
        """`full`, and the LoRA experts with the highest scores for the other places."""
        return (0, *self._highest(range(1, len(self.scores)), self.top_k - 1))

    @property
    def margin(self) -> float:
        """Margin of `full` over the best LoRA expert."""
        return score_margin(self.scores[0], max(self.scores[1:]))

    def draw(self) -> random.Random:
        """Return a generator of this layer and step."""
        return random.Random(f"{self.seed}/{self.layer}/{self.step}")

    def _highest(self, eligible: Sequence[int], count: int) -> Winners:
        best_first = sorted(eligible, key=lambda expert: (-self.scores[expert], expert))
        return tuple(sorted(best_first[:count]))


def score_margin(full: float, lora: float) -> float:
    """Return `(full - lora) / (|full| + |lora|)`, from -1 to 1; 0 if both scores are 0."""
    size = abs(full) + abs(lora)
    return (full - lora) / size if size else 0.0


class Rule(ABC):
    """Chooses the winners of layers.

    Attributes:
        needs_full: Whether every layer needs a `full` expert.
        compares_layers: Whether the choice in one layer depends on others. Such a rule needs the
            scores of all layers at once.
        draws: Whether winners are drawn at random.
    """

    needs_full = False
    compares_layers = False
    draws = False

    @abstractmethod
    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Return the winners of each layer."""

    def eligible(self, experts: tuple[str, ...], lora_experts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the experts that can win."""
        return experts

    def most_winners(self, experts: tuple[str, ...], lora_experts: tuple[str, ...]) -> int:
        """Return the largest `top_k`."""
        return len(self.eligible(experts, lora_experts))


class Best(Rule):
    """The `top_k` highest scores of each layer win (arXiv 2605.07111)."""

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Return the best experts of each layer."""
        return [layer.best for layer in layers]


class AlwaysFull(Rule):
    """Control: `full` always wins."""

    needs_full = True

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Return expert 0 for each layer."""
        return [(0,)] * len(layers)

    def eligible(self, experts: tuple[str, ...], lora_experts: tuple[str, ...]) -> tuple[str, ...]:
        """Return `full`."""
        return ("full",)


class AlwaysLora(Rule):
    """Control: the best LoRA experts always win."""

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Return the best LoRA experts of each layer."""
        return [layer.best_lora for layer in layers]

    def eligible(self, experts: tuple[str, ...], lora_experts: tuple[str, ...]) -> tuple[str, ...]:
        """Return the LoRA experts."""
        return lora_experts


class Random(Rule):
    """Control: `top_k` experts of each layer are drawn."""

    draws = True

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Draw from all experts of each layer."""
        return [
            tuple(sorted(layer.draw().sample(range(len(layer.scores)), layer.top_k)))
            for layer in layers
        ]


class _FullOrLora(Rule):
    """In each layer `full` wins, beside the best LoRA experts, or the best LoRA experts alone."""

    needs_full = True

    def most_winners(self, experts: tuple[str, ...], lora_experts: tuple[str, ...]) -> int:
        """Return the number of LoRA experts: layers without `full` need as many winners."""
        return len(lora_experts)

    @staticmethod
    def _winners(layers: Sequence[Candidates], with_full: Sequence[bool]) -> list[Winners]:
        return [
            layer.full_and_best_lora if full else layer.best_lora
            for layer, full in zip(layers, with_full, strict=True)
        ]


@dataclass(frozen=True)
class RandomShare(_FullOrLora):
    """Control: `full` wins with a given probability, in each layer and step.

    Attributes:
        share: The probability.
    """

    share: float
    draws = True

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Draw for each layer."""
        return self._winners(layers, [layer.draw().random() < self.share for layer in layers])


@dataclass(frozen=True)
class BestShare(_FullOrLora):
    """`full` wins in a given share of the layers: those where it leads the LoRA experts most.

    Attributes:
        share: The share of layers, rounded to whole layers.
    """

    share: float
    compares_layers = True

    def count(self, layers: int) -> int:
        """Return the number of layers that `full` wins of so many."""
        return round(self.share * layers)

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Rank the layers by their margins; among equal margins the first layers win."""
        ranking = sorted(range(len(layers)), key=lambda i: -layers[i].margin)  # stable
        chosen = set(ranking[: self.count(len(layers))])
        return self._winners(layers, [number in chosen for number in range(len(layers))])


class Shuffled(_FullOrLora):
    """Control: `full` wins in as many layers as the best scores give it, drawn at random."""

    compares_layers = True
    draws = True

    def choose(self, layers: Sequence[Candidates]) -> list[Winners]:
        """Count the layers that `full` would win; draw as many."""
        count = sum(0 in layer.best for layer in layers)
        step = max((layer.step for layer in layers), default=0)
        seed = layers[0].seed if layers else 0
        # Sorted by name, so that the draw does not depend on the order of parameters.
        names = sorted(layer.layer for layer in layers)
        chosen = set(random.Random(f"{seed}/shuffled/{step}").sample(names, count))
        return self._winners(layers, [layer.layer in chosen for layer in layers])
