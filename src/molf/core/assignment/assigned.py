"""One layer of an assignment, and the evidence of a routed training for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from molf.inputs import is_integer, is_number

FULL, LORA, FROZEN = "full", "lora", "frozen"
KINDS = (FULL, LORA, FROZEN)
"""`full`: the weight is trained. `lora`: an adapter beside it. `frozen`: neither."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The decisions of a routed training in one layer.

    Attributes:
        decisions: Number of decisions; those at learning rate 0, where all scores are 0, are left
            out.
        wins: Name of each expert and the number of decisions that it won, `full` first. With
            `top_k` above 1 they add up to `top_k` times the decisions.
        changes: Number of decisions whose winners differ from those of the decision before.
        last_change: The step of the last change, from 1; None without any.
        margin: Mean of `(full - lora) / (|full| + |lora|)`, the scores of `full` and of the best
            LoRA expert, from -1 to 1; None without a `full` expert.
    """

    decisions: int
    wins: tuple[tuple[str, int], ...]
    changes: int = 0
    last_change: int | None = None
    margin: float | None = None

    @property
    def most(self) -> str:
        """The expert with the most wins; among equal numbers the first."""
        return max(self.wins, key=lambda pair: pair[1])[0]

    def share(self, expert: str) -> float:
        """Return the share of the decisions that an expert won."""
        return dict(self.wins).get(expert, 0) / self.decisions if self.decisions else 0.0

    def as_values(self) -> dict[str, Any]:
        """Return plain values; `of_values` is the inverse."""
        return {**vars(self), "wins": dict(self.wins)}

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Evidence:
        """Build from plain values.

        Raises:
            ValueError: A value is missing, unknown or not a number.
        """
        names = {*cls.__dataclass_fields__}
        if not isinstance(values, Mapping) or set(values) - names:
            raise ValueError(f"Invalid evidence {values!r}. Must have {', '.join(sorted(names))}.")
        given = dict(values)
        wins = given.pop("wins", None)
        if not isinstance(wins, Mapping) or not all(_is_count(count) for count in wins.values()):
            raise ValueError(f"Invalid wins={wins!r} of evidence. Must be a number per expert.")
        for name in ("decisions", "changes", "last_change", "margin"):
            value = given.get(name)
            if not (value is None or is_number(value)) or (
                name == "decisions" and not _is_count(value)
            ):
                raise ValueError(f"Invalid {name}={value!r} of evidence. Must be a number.")
        return cls(wins=tuple((str(name), count) for name, count in wins.items()), **given)


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


@dataclass(frozen=True, kw_only=True)
class AssignedLayer:
    """A linear layer and its training.

    Attributes:
        name: The layer's name in the plain model.
        shape: (out, in).
        train: `"full"`, `"lora"` or `"frozen"`.
        r: Rank of the adapter; None unless `train` is `"lora"`.
        alpha: LoRA alpha; None unless `train` is `"lora"`.
        evidence: The decisions that led to `train`, if it was chosen by a routed training.

    Raises:
        ValueError: A value is not allowed, or the rank exceeds the layer's smaller side.
    """

    name: str
    shape: tuple[int, int]
    train: str
    r: int | None = None
    alpha: float | None = None
    evidence: Evidence | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        own = f"Layer {self.name}"
        if self.train not in KINDS:
            raise ValueError(f"{own}: invalid train={self.train!r}. Must be {', '.join(KINDS)}.")
        check_rank(self.r, self.alpha, own, is_lora=self.train == LORA)
        if self.r is not None and self.r > min(self.shape):
            raise ValueError(
                f"{own}: r={self.r} exceeds its smaller side, {min(self.shape)} ({self.shown})."
            )

    @property
    def shown(self) -> str:
        """The shape as text, `out x in`."""
        return "x".join(map(str, self.shape))

    @property
    def weights(self) -> int:
        """Number of elements of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def factors(self) -> int:
        """Number of elements of the adapter's factors, A [r, in] and B [out, r]; 0 without one."""
        return (self.r or 0) * sum(self.shape)

    def scaling(self, *, use_rslora: bool) -> float:
        """Return the factor of the adapter's output: `alpha / sqrt(r)` or `alpha / r`."""
        rank = self.r or 1
        return (self.alpha or 0.0) / (math.sqrt(rank) if use_rslora else rank)


class Treatment(NamedTuple):
    """The training of a layer.

    Attributes:
        train: `"full"`, `"lora"` or `"frozen"`.
        r: Rank of the adapter; None without one.
        alpha: LoRA alpha; None without an adapter.
    """

    train: str
    r: int | None = None
    alpha: float | None = None

    def fitted(self, shape: tuple[int, int], *, use_rslora: bool) -> Treatment:
        """Return it for a layer: a rank above the smaller side becomes that, at equal scaling.

        Factors of that rank hold every change of the weight already.

        Args:
            shape: (out, in) of the layer.
            use_rslora: Whether alpha is for rank-stabilised scaling.
        """
        if self.r is None or self.alpha is None or self.r <= min(shape):
            return self
        ratio = min(shape) / self.r
        alpha = self.alpha * (math.sqrt(ratio) if use_rslora else ratio)
        return Treatment(self.train, min(shape), float(f"{alpha:.12g}"))


@dataclass(frozen=True, kw_only=True)
class Decided:
    """The decisions of a routed training, and the model that it trained.

    Attributes:
        layers: (out, in) of every linear layer of the model outside of its head, in its order.
        heads: The same of its head.
        evidence: Decisions by name of the routed layer.
        adapters: Treatment that each LoRA expert stands for, by its name; alpha is for
            rank-stabilised scaling.
        trained: Names of the layers whose weight was trained without being routed.
        freeze_rest: Whether nothing else was trained.
        frozen_rest: Names of other parameters that were not trained, if some were.
        model: A description of the model.
        source: What took the decisions.
    """

    layers: Mapping[str, tuple[int, int]]
    heads: Mapping[str, tuple[int, int]]
    evidence: Mapping[str, Evidence]
    adapters: Mapping[str, Treatment]
    trained: frozenset[str] = frozenset()
    freeze_rest: bool = False
    frozen_rest: tuple[str, ...] = ()
    model: str = ""
    source: str = "a routed training"


def adapters_of(
    experts: Iterable[str], ranks: Iterable[int], scalings: Iterable[float]
) -> dict[str, Treatment]:
    """Return the treatment that each LoRA expert stands for, with alpha for rsLoRA.

    Args:
        experts: Names of the LoRA experts.
        ranks: Their ranks.
        scalings: Factors of their products.
    """
    return {
        name: Treatment(LORA, rank, float(f"{scaling * math.sqrt(rank):.12g}"))
        for name, rank, scaling in zip(experts, ranks, scalings, strict=True)
    }


def check_rank(r: Any, alpha: Any, own: str, *, is_lora: bool) -> None:
    """Check the rank and alpha of an adapter.

    Args:
        r: The rank.
        alpha: LoRA alpha.
        own: Start of the message.
        is_lora: Whether there is an adapter; without one both must be None.

    Raises:
        ValueError: One of them is not allowed.
    """
    if not is_lora:
        if r is not None or alpha is not None:
            raise ValueError(
                f"{own}: only lora has r and alpha. Give train: lora, or leave both out."
            )
        return
    if not (_is_count(r) and is_number(r) and r >= 1):
        raise ValueError(
            f"{own}: invalid r={r!r}. Must be an integer from 1 to a layer's smaller side."
        )
    if not (is_number(alpha) and alpha > 0):
        raise ValueError(f"{own}: invalid alpha={alpha!r}. Must be a positive, finite number.")


def default_alpha(r: int, *, use_rslora: bool) -> float:
    """Return the alpha of the paper's LoRA baseline: a scaling of about 2.

    `2 r`, or `2 sqrt(r)` rounded to an integer with rank-stabilised scaling.
    """
    return float(round(2 * math.sqrt(max(r, 0))) if use_rslora else 2.0 * r)


def weights_of(layers: Iterable[AssignedLayer]) -> int:
    """Return the number of elements of the layers' weights."""
    return sum(layer.weights for layer in layers)
