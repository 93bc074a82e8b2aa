"""A routing score: the sums that it needs and the function that turns them into one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

SCORE_EPS = 1e-8
"""Added to `sqrt(v)` in scores; independent of the optimizer's eps."""


@dataclass
class Block:
    """A block of a tensor while its moments are updated, in float32 (float64 for float64 weights).

    Attributes:
        grad: Gradient g. Do not write to it.
        exp_avg: First moment m, in the shape of g. Do not write to it.
        exp_avg_sq: Second moment v, in the shape of g. Do not write to it.
    """

    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    known_direction: Tensor | None = None

    @property
    def direction(self) -> Tensor:
        """`m / (sqrt(v) + 1e-8)`, without bias correction. Do not write to it."""
        if self.known_direction is None:
            # m * (1 / root) would round once more than m / root.
            self.known_direction = self.exp_avg / self.exp_avg_sq.sqrt().add_(SCORE_EPS)
        return self.known_direction


@dataclass(frozen=True)
class ScoreTerm:
    """A sum over the elements of an expert's tensors, made while their moments are updated.

    Attributes:
        name: Key of the sum in `Part.sums`.
        factors: Returns one tensor, whose elements are summed, or two, whose products are summed.
            Both in the shape of the block, of any real dtype.
        is_before: Whether the block holds the moments before the update (m and v of step t - 1,
            gradient of step t) instead of after it.
    """

    name: str
    factors: Callable[[Block], tuple[Tensor] | tuple[Tensor, Tensor]]
    is_before: bool = False


class Part(NamedTuple):
    """One tensor of an expert.

    Attributes:
        name: "weight", "bias", "lora_A" or "lora_B".
        size: Number of elements of the whole tensor.
        sums: Sum of each term of the score, by the term's name.
    """

    name: str
    size: int
    sums: Mapping[str, float]


class Expert(NamedTuple):
    """An expert in one step, as a score reads it.

    Attributes:
        name: "full" or `lora{i}_r{rank}`.
        rank: Rank of a LoRA expert; None for `full`.
        lr: Scheduled learning rate.
        scaling: s of a LoRA expert; 1 for `full`.
        shape: (out, in) of the layer.
        parts: Its tensors.
        kept: Numbers that the score keeps from step to step, by name; a score may change them.
    """

    name: str
    rank: int | None
    lr: float
    scaling: float
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    kept: dict[str, float]

    def total(self, term: str) -> float:
        """Return the sum of a term over all tensors."""
        return sum(part.sums[term] for part in self.parts)

    @property
    def size(self) -> int:
        """Number of parameters, n_e."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Score:
    """A routing score.

    Attributes:
        name: Value of `MoLFConfig.score`: lower-case letters, digits and hyphens.
        terms: Sums that the score needs.
        value: Returns the score of an expert, a finite float; the highest score of a layer wins. It
            may change the numbers of `Expert.kept`.
        kept: Initial values of the numbers that the score keeps for each expert. They are part of
            the optimizer's state.
    """

    name: str
    terms: tuple[ScoreTerm, ...]
    value: Callable[[Expert], float]
    kept: Mapping[str, float] = field(default_factory=dict)
