"""MoLF: full fine-tuning and LoRA in one optimizer, routed per layer and per step.

Names are imported on first use. The optimizer needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from molf.api.jobs import evaluate, find_rates, plan, probe, train
    from molf.api.routing_callback import RoutingCallback
    from molf.api.run import Run
    from molf.core.adamw import AdamW
    from molf.core.assignment.assigned import AssignedLayer, Evidence
    from molf.core.assignment.assignment import Assignment
    from molf.core.assignment.model import with_assignment
    from molf.core.config import MoLFConfig
    from molf.core.model.merge import MergeReport, merge
    from molf.core.model.peft_model import peft_config, with_adapter
    from molf.core.optimizer import MoLFAdamW
    from molf.core.scores.registry import register_score
    from molf.core.scores.score import Score, ScoreTerm
    from molf.core.step.decision import Decision
    from molf.core.trainer import trainer_optimizer
    from molf.job.ahead.evidence import RangeTest
    from molf.job.record.assignment_source import read_assignment
    from molf.planning.request import TrainingPlan

# Imported on first use, so that `import molf` and `molf --help` stay fast.
_HOMES = {
    "AdamW": "molf.core.adamw",
    "AssignedLayer": "molf.core.assignment.assigned",
    "Assignment": "molf.core.assignment.assignment",
    "Decision": "molf.core.step.decision",
    "Evidence": "molf.core.assignment.assigned",
    "MergeReport": "molf.core.model.merge",
    "MoLFAdamW": "molf.core.optimizer",
    "MoLFConfig": "molf.core.config",
    "RangeTest": "molf.job.ahead.evidence",
    "RoutingCallback": "molf.api.routing_callback",
    "Run": "molf.api.run",
    "Score": "molf.core.scores.score",
    "ScoreTerm": "molf.core.scores.score",
    "TrainingPlan": "molf.planning.request",
    "evaluate": "molf.api.jobs",
    "find_rates": "molf.api.jobs",
    "merge": "molf.core.model.merge",
    "peft_config": "molf.core.model.peft_model",
    "plan": "molf.api.jobs",
    "probe": "molf.api.jobs",
    "read_assignment": "molf.job.record.assignment_source",
    "register_score": "molf.core.scores.registry",
    "train": "molf.api.jobs",
    "trainer_optimizer": "molf.core.trainer",
    "with_assignment": "molf.core.assignment.model",
    "with_adapter": "molf.core.model.peft_model",
}

__all__ = [
    "AdamW",
    "AssignedLayer",
    "Assignment",
    "Decision",
    "Evidence",
    "MergeReport",
    "MoLFAdamW",
    "MoLFConfig",
    "RangeTest",
    "RoutingCallback",
    "Run",
    "Score",
    "ScoreTerm",
    "TrainingPlan",
    "evaluate",
    "find_rates",
    "merge",
    "peft_config",
    "plan",
    "probe",
    "read_assignment",
    "register_score",
    "train",
    "trainer_optimizer",
    "with_adapter",
    "with_assignment",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("molf")
    if name not in _HOMES:
        raise AttributeError(f"module 'molf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
