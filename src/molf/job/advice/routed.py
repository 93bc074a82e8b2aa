"""Evidence of a routing log: by layer, by kind of projection, and by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from molf.core.assignment.assigned import FULL, LORA, AssignedLayer, Evidence, Treatment
from molf.core.assignment.choice import by_shape, by_wins
from molf.core.config import MoLFConfig
from molf.core.scores.score import Expert
from molf.core.scores.shape import noise_share

SMALL_MARGIN = 0.05  # below it two scores are within about a tenth of each other
LATE = 0.5  # share of the steps; a change of winner after it is called late
_MOST_BANDS = 12  # rows of the table by depth


@dataclass(frozen=True)
class RoutedLayer:
    """A routed layer: its decisions, and the prediction by shape.

    Attributes:
        name: The layer's name in the plain model.
        evidence: The evidence.
        by_wins: Treatment of the expert with the most wins.
        by_shape: Treatment that shape, scaling and rates alone predict; None without a `full`
            expert or a known shape.
        tips_at: The ratio of LoRA rate to full rate above which shape alone predicts LoRA; None
            like `by_shape`.
    """

    name: str
    evidence: Evidence
    by_wins: Treatment
    by_shape: Treatment | None
    tips_at: float | None

    @property
    def kind(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def depth(self) -> int | None:
        """The first number in the name: the index of the decoder layer; None without one."""
        return next((int(part) for part in self.name.split(".") if part.isdecimal()), None)

    @property
    def settled(self) -> int:
        """The step of the last change of winner; 1 without any."""
        return self.evidence.last_change or 1

    @property
    def differs(self) -> bool:
        """Whether the most wins went to another expert than shape predicts."""
        return self.by_shape is not None and self.by_shape != self.by_wins


@dataclass(frozen=True)
class Group:
    """Several layers in one row of a table.

    Attributes:
        name: The kind of the layers, or their depths.
        layers: The layers.
    """

    name: str
    layers: tuple[RoutedLayer, ...]

    def won(self, expert: str) -> float:
        """Return the mean share of decisions that an expert won."""
        return _mean(one.evidence.share(expert) for one in self.layers)

    @property
    def margin(self) -> float | None:
        """Mean margin of `full`; None without a `full` expert."""
        margins = [one.evidence.margin for one in self.layers if one.evidence.margin is not None]
        return _mean(margins) if margins else None

    @property
    def changes(self) -> float:
        """Changes of winner per layer."""
        return _mean(one.evidence.changes for one in self.layers)

    @property
    def settled(self) -> float:
        """Median step of the last change of winner."""
        return median(one.settled for one in self.layers)

    @property
    def differing(self) -> int:
        """Number of layers in which the wins differ from the prediction by shape."""
        return sum(one.differs for one in self.layers)

    @property
    def full_by_shape(self) -> int:
        """Number of layers in which shape predicts `full`."""
        return sum(one.by_shape is not None and one.by_shape.train == FULL for one in self.layers)


@dataclass(frozen=True)
class RoutedLayers:
    """The routed layers of a run.

    Attributes:
        steps: Decisions per layer, those at rate 0 left out.
        experts: Names of the experts, `full` first if there is one.
        rate_ratio: LoRA rate divided by the rate of `full`.
        layers: The routed layers.
    """

    steps: int
    experts: tuple[str, ...]
    rate_ratio: float
    layers: tuple[RoutedLayer, ...]

    @property
    def has_full(self) -> bool:
        """Whether `full` was one of the experts."""
        return FULL in self.experts

    @property
    def lora_experts(self) -> tuple[str, ...]:
        """Names of the LoRA experts."""
        return tuple(name for name in self.experts if name != FULL)

    @property
    def differing(self) -> int:
        """Number of layers in which the wins differ from the prediction by shape."""
        return sum(one.differs for one in self.layers)

    @property
    def close(self) -> int:
        """Number of layers with a margin within 0.05 of 0."""
        margins = (one.evidence.margin for one in self.layers)
        return sum(margin is not None and abs(margin) < SMALL_MARGIN for margin in margins)

    @property
    def late(self) -> int:
        """Number of layers that changed their winner in the second half of the steps."""
        return sum(one.settled > max(LATE * self.steps, 1) for one in self.layers)

    def settled_by(self, share: float) -> float:
        """Return the share of layers that kept their winner after this share of the steps."""
        limit = max(1, math.floor(share * self.steps))
        return _mean(one.settled <= limit for one in self.layers)

    @property
    def by_kind(self) -> tuple[Group, ...]:
        """The layers by kind of projection, in the model's order."""
        return _groups(self.layers, lambda one: one.kind)

    @property
    def by_depth(self) -> tuple[Group, ...]:
        """The layers by depth, in at most 12 bands."""
        depths = sorted({one.depth for one in self.layers if one.depth is not None})
        if not depths:
            return ()
        size = -(-len(depths) // _MOST_BANDS)
        bands = [depths[start : start + size] for start in range(0, len(depths), size)]
        names = {
            depth: str(band[0]) if len(band) == 1 else f"{band[0]}-{band[-1]}"
            for band in bands
            for depth in band
        }
        return _groups(self.layers, lambda one: names.get(one.depth, "none"))  # type: ignore[arg-type]


def routed_layers(
    evidence: Mapping[str, Evidence],
    shapes: Mapping[str, tuple[int, int]],
    config: MoLFConfig,
    rate_ratio: float,
) -> RoutedLayers | None:
    """Return the layers with decisions, in the order of `evidence`; None if there are none.

    Args:
        evidence: The decisions by layer.
        shapes: Shape (out, in) by layer; a layer without one has no prediction.
        config: The experts.
        rate_ratio: LoRA rate divided by the rate of `full`.
    """
    decided = {name: one for name, one in evidence.items() if one.decisions}
    if not decided:
        return None
    ranks = dict(zip(config.lora_experts, config.ranks, strict=True))
    experts = tuple(name for name, _ in next(iter(decided.values())).wins)
    won = by_wins(decided, {name: Treatment(LORA, ranks.get(name)) for name in experts})
    known = [
        AssignedLayer(name=name, shape=shapes[name], train=FULL)
        for name in decided
        if name in shapes and FULL in experts
    ]
    predicted = by_shape(known, config, 1.0, rate_ratio)
    tips = {layer.name: _tips_at(layer.shape, config) for layer in known}
    layers = []
    for name, one in decided.items():
        shaped = predicted.get(name)
        # Rank and scaling tell LoRA experts apart; alpha may be rounded.
        shaped = None if shaped is None else Treatment(shaped.train, shaped.r)
        layers.append(RoutedLayer(name, one, won[name], shaped, tips.get(name)))
    steps = max(one.decisions for one in decided.values())
    return RoutedLayers(steps, experts, rate_ratio, tuple(layers))


def _tips_at(shape: tuple[int, int], config: MoLFConfig) -> float:
    """Return the ratio of rates at which `full` and the best LoRA expert score alike by shape."""
    experts = (
        Expert(name, rank, 1.0, scaling, shape, (), {})
        for name, rank, scaling in zip(
            config.lora_experts, config.ranks, config.scalings, strict=True
        )
    )
    return 1 / max(noise_share(one) for one in experts)


def _groups(
    layers: Sequence[RoutedLayer], name_of: Callable[[RoutedLayer], str]
) -> tuple[Group, ...]:
    groups: dict[str, list[RoutedLayer]] = {}
    for one in layers:
        groups.setdefault(name_of(one), []).append(one)
    return tuple(Group(name, tuple(members)) for name, members in groups.items())


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
