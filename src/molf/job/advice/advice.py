"""The assignment that a run's routing suggests, with the evidence for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from molf.core.assignment.assigned import FULL, LORA, AssignedLayer, Evidence, Treatment
from molf.core.assignment.assignment import Assignment
from molf.core.config import MoLFConfig
from molf.core.scores.score import Expert
from molf.core.scores.shape import noise_share
from molf.errors import InputError
from molf.job.record.assignment_source import decided_in
from molf.job.record.finished_run import FinishedRun

SMALL_MARGIN = 0.05  # below it two scores are within about a tenth of each other
LATE = 0.5  # share of the steps; a change of winner after it is called late
_MOST_BANDS = 12  # rows of the table by depth


@dataclass(frozen=True)
class LayerAdvice:
    """A routed layer: its assignment, its decisions, and the prediction by shape.

    Attributes:
        assigned: The layer with its training and its evidence.
        evidence: The evidence.
        by_wins: Treatment of the expert with the most wins.
        by_shape: Treatment that shape, scaling and rates alone predict; None without a `full`
            expert.
        tips_at: The ratio of LoRA rate to full rate above which shape alone predicts LoRA; None
            without a `full` expert.
    """

    assigned: AssignedLayer
    evidence: Evidence
    by_wins: Treatment
    by_shape: Treatment | None
    tips_at: float | None

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.assigned.name

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

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "shape": list(self.assigned.shape),
            "train": self.assigned.train,
            "r": self.assigned.r,
            "alpha": self.assigned.alpha,
            **self.evidence.as_values(),
            "by_wins": self.by_wins._asdict(),
            "by_shape": None if self.by_shape is None else self.by_shape._asdict(),
            "tips_at": self.tips_at,
        }


@dataclass(frozen=True)
class Group:
    """Several layers in one row of a table.

    Attributes:
        name: The kind of the layers, or their depths.
        layers: The layers.
    """

    name: str
    layers: tuple[LayerAdvice, ...]

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

    def assigned_to(self, treatment: str) -> int:
        """Return the number of layers assigned to `full`, or to LoRA of a rank (`r 16`)."""
        return sum(_shown(one.assigned) == treatment for one in self.layers)


@dataclass(frozen=True)
class Advice:
    """The advice for a run.

    Attributes:
        run: The run.
        steps: Decisions per layer, those at rate 0 left out.
        experts: Names of the experts, `full` first if there is one.
        rate_ratio: LoRA rate divided by the rate of `full`.
        layers: The routed layers.
        assignment: The assignment of all layers.
    """

    run: FinishedRun
    steps: int
    experts: tuple[str, ...]
    rate_ratio: float
    layers: tuple[LayerAdvice, ...]
    assignment: Assignment

    @property
    def score(self) -> str:
        """The score of the run."""
        return str(self.run.config.get("score"))

    @property
    def has_full(self) -> bool:
        """Whether `full` was one of the experts."""
        return FULL in self.experts

    @property
    def lora_experts(self) -> tuple[str, ...]:
        """Names of the LoRA experts."""
        return tuple(name for name in self.experts if name != FULL)

    @property
    def lora_names(self) -> tuple[str, ...]:
        """Names of the LoRA experts by rank, such as `r 16`."""
        return tuple(f"r {rank}" for rank in self.run.config["ranks"])

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


def advise(run: FinishedRun, *, share: float | None = None, by: str = "wins") -> Advice:
    """Return the assignment that the routing of a run suggests.

    Args:
        run: A run of molf or molf-e, or a probe.
        share: Give `full` to this share of the routed layers: those where it leads most.
        by: Without `share`: `"wins"` or `"score"`, as in `Assignment.from_decisions`.

    Raises:
        InputError: The run has no routing, took no decision, or its base cannot be read; or
            `share` or `by` is not allowed.
    """
    from molf.core.assignment.layout import Layout
    from molf.job.model.loading import load_skeleton

    decided = decided_in(run, Layout.of(load_skeleton(str(run.base))))
    try:
        assignment = Assignment.from_decisions(decided, share=share, by=by)
        wins = Assignment.from_decisions(decided)
    except ValueError as error:
        raise InputError(f"{run.path}: {error}") from error
    evidence = {name: one for name, one in decided.evidence.items() if one.decisions}
    experts = tuple(name for name, _ in next(iter(evidence.values())).wins)
    config = experts_of(run)
    ratio = float(run.config["lora_learning_rate"]) / float(run.config["learning_rate"])
    shaped = wins.by_shape(config, lora_lr=ratio) if FULL in experts else None
    layers = []
    for name in {**decided.layers, **decided.heads}:  # the model's order
        if name not in evidence:
            continue
        one = evidence[name]
        predicted = None if shaped is None else _treatment(shaped[name])
        tips_at = None if shaped is None else _tips_at(shaped[name].shape, config)
        won = _treatment(wins[name])
        layers.append(LayerAdvice(assignment[name], one, won, predicted, tips_at))
    return Advice(
        run=run,
        steps=max(one.decisions for one in evidence.values()),
        experts=experts,
        rate_ratio=ratio,
        layers=tuple(layers),
        assignment=assignment,
    )


def experts_of(run: FinishedRun) -> MoLFConfig:
    """Return ranks, alpha and scaling of a run's LoRA experts."""
    return MoLFConfig(
        ranks=tuple(run.config["ranks"]),
        alpha=tuple(run.config["alpha"]),
        use_rslora=run.config["use_rslora"],
        freeze_base=run.method == "molf-e",
    )


def _tips_at(shape: tuple[int, int], config: MoLFConfig) -> float:
    """Return the ratio of rates at which `full` and the best LoRA expert score alike by shape."""
    experts = (
        Expert(name, rank, 1.0, scaling, shape, (), {})
        for name, rank, scaling in zip(
            config.lora_experts, config.ranks, config.scalings, strict=True
        )
    )
    return 1 / max(noise_share(one) for one in experts)


def _treatment(layer: AssignedLayer) -> Treatment:
    # Rank and scaling tell LoRA experts apart; alpha may be rounded.
    return Treatment(layer.train, layer.r)


def _groups(
    layers: Iterable[LayerAdvice], name_of: Callable[[LayerAdvice], str]
) -> tuple[Group, ...]:
    groups: dict[str, list[LayerAdvice]] = {}
    for one in layers:
        groups.setdefault(name_of(one), []).append(one)
    return tuple(Group(name, tuple(members)) for name, members in groups.items())


def _shown(layer: AssignedLayer) -> str:
    return f"r {layer.r}" if layer.train == LORA else layer.train


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
