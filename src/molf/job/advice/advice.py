"""The assignment that a run's routing suggests, with the evidence for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from molf.core.assignment.assigned import FULL, AssignedLayer
from molf.core.assignment.assignment import Assignment
from molf.errors import InputError
from molf.job.advice.routed import Group, RoutedLayer, RoutedLayers, routed_layers
from molf.job.record.assignment_source import decided_in, experts_of
from molf.job.record.finished_run import FinishedRun


@dataclass(frozen=True)
class Advice(RoutedLayers):
    """The advice for a run: its routed layers, and an assignment.

    Attributes:
        run: The run.
        assignment: The assignment of all layers.
    """

    run: FinishedRun
    assignment: Assignment

    @property
    def score(self) -> str:
        """The score of the run."""
        return str(self.run.config.get("score"))

    @property
    def shown_names(self) -> dict[str, str]:
        """The experts as tables name them, LoRA by rank: `full`, `r 16`."""
        ranks = zip(self.lora_experts, self.run.config["ranks"], strict=True)
        return {FULL: FULL, **{name: f"r {rank}" for name, rank in ranks}}

    def assigned(self, layer: RoutedLayer) -> AssignedLayer:
        """Return the assignment of a layer."""
        return self.assignment[layer.name]

    def assigned_to(self, group: Group, expert: str) -> int:
        """Return the number of layers whose assignment is that of an expert."""
        return sum(self._expert_of(self.assigned(one)) == expert for one in group.layers)

    def _expert_of(self, layer: AssignedLayer) -> str:
        """Return the expert whose rank a layer has: the first, if the layer is too small for it."""
        ranks = zip(self.lora_experts, self.run.config["ranks"], strict=True)
        fitting = (name for name, rank in ranks if min(rank, *layer.shape) == layer.r)
        return next(fitting, layer.train)

    def record(self, layer: RoutedLayer) -> dict[str, Any]:
        """Return a layer as plain values."""
        assigned = self.assigned(layer)
        return {
            "name": layer.name,
            "shape": list(assigned.shape),
            "train": assigned.train,
            "r": assigned.r,
            "alpha": assigned.alpha,
            **layer.evidence.as_values(),
            "by_wins": layer.by_wins._asdict(),
            "by_shape": None if layer.by_shape is None else layer.by_shape._asdict(),
            "tips_at": layer.tips_at,
        }


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
    except ValueError as error:
        raise InputError(f"{run.path}: {error}") from error
    shapes = {**decided.layers, **decided.heads}  # the model's order
    evidence = {name: decided.evidence[name] for name in shapes if name in decided.evidence}
    routed = routed_layers(evidence, shapes, experts_of(run), rate_ratio_of(run))
    assert routed is not None  # the assignment needs a decision
    return Advice(**vars(routed), run=run, assignment=assignment)


def rate_ratio_of(run: FinishedRun) -> float:
    """Return the LoRA rate of a run divided by its rate of `full`."""
    return float(run.config["lora_learning_rate"]) / float(run.config["learning_rate"])
