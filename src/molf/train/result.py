"""What a finished run hands back and writes down, and how a failed one ends."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from molf.evaluate import Evaluation
from molf.train.defaults import ADAPTERS, ROUTED
from molf.train.resolved import ResolvedSettings


class RunError(RuntimeError):
    """A run failed after it had begun to write: one line with the cause and where to look."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: The run's directory.
        before: Metrics of the base model.
        after: Metrics of the saved model.
        steps: Optimizer steps, skipped ones included.
        skipped_steps: How many of them were skipped, because something was not finite.
        training_loss: Mean loss over the training.
        trained_parameters: How many numbers were trained.
        lora_parameters: How many plain LoRA of the settings' rank trains; None without an adapter.
        tokens: Tokens trained on, padding left out.
        preparation_seconds: Time of putting in the adapter.
        training_seconds: Time of the training.
        evaluation_seconds: Time of both evaluations.
        peak_memory_bytes: The most memory needed.
        peak_memory_of: What that is the memory of.
        shares: Share of layers that each expert won; empty without routing.
        routing: What the routing came to, in words; empty without routing.
        saved: How the model was stored, and how much of the training that kept.
        silenced: Why standard error took no more progress and warnings; empty if it took all.
        results: The table that has the run's row; None if it could not be added.
        kernels: Who computed the optimizer's steps, eager torch or triton; None where that is not
            the run's to choose.
    """

    directory: Path
    before: Evaluation
    after: Evaluation
    steps: int
    training_loss: float
    trained_parameters: int
    lora_parameters: int | None
    tokens: int
    preparation_seconds: float
    training_seconds: float
    evaluation_seconds: float
    peak_memory_bytes: int
    peak_memory_of: str
    shares: dict[str, float]
    routing: str = ""
    skipped_steps: int = 0
    saved: dict[str, Any] = field(default_factory=dict)
    kernels: str | None = None
    silenced: str = ""
    results: Path | None = None


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation in the form of `eval.json`: metrics by name, then tables by name.

    An end of an interval that is not known (NaN) is written as null, which JSON has.
    """
    record: dict[str, Any] = _without_nan(
        {
            **{name: asdict(metric) for name, metric in evaluation.metrics.items()},
            **asdict(evaluation)["tables"],
        }
    )
    return record


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def results_row(result: RunResult, settings: ResolvedSettings, started: datetime) -> dict[str, Any]:
    """Return a run's row of `results.csv`."""
    config = settings.method_config
    return {
        "run": result.directory.name,
        "started": started.isoformat(timespec="seconds"),
        "task": settings.task,
        "method": settings.method,
        "model": settings.model,
        "seed": settings.seed,
        "ranks": ",".join(map(str, config.ranks)) if config else "",
        "alpha": ",".join(f"{alpha:g}" for alpha in config.alphas) if config else "",
        "match": settings.match if settings.method in ADAPTERS else "",
        "trained_parameters": result.trained_parameters,
        "lora_parameters": result.lora_parameters or "",
        "score": config.score if config and settings.method in ROUTED else "",
        "learning_rate": settings.learning_rate if settings.trains_dense else "",
        "lora_learning_rate": settings.lora_learning_rate if config else "",
        "steps": result.steps,
        "skipped_steps": result.skipped_steps,
        "training_loss": result.training_loss,
        "tokens": result.tokens,
        "preparation_seconds": round(result.preparation_seconds, 3),
        "training_seconds": round(result.training_seconds, 3),
        "evaluation_seconds": round(result.evaluation_seconds, 3),
        "peak_memory_bytes": result.peak_memory_bytes,
        **{f"won/{name}": share for name, share in result.shares.items()},
        **{f"before/{name}": metric.value for name, metric in result.before.metrics.items()},
        **{f"after/{name}": metric.value for name, metric in result.after.metrics.items()},
    }
