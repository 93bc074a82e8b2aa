"""The result of a run, its records in files, and the error of a failed run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS, ROUTED
from molf.job.settings.resolved import ResolvedSettings
from molf.measure import Evaluation


class RunError(RuntimeError):
    """A run failed after it had begun to write; one line with cause and path of the traceback."""


class DivergedError(RunError):
    """A loss, a gradient or a trained weight became infinite or NaN."""


class ResumeError(InputError):
    """A run cannot be resumed with this model or data; nothing was changed."""


class StoppedError(Exception):
    """A signal stopped the training after a step; one line with the way to continue."""


class FinishedError(Exception):
    """A run that should be resumed is complete; one line with its path."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        directory: The run's directory.
        before: Metrics of the base model.
        after: Metrics of the saved model.
        steps: Optimizer steps, including skipped ones.
        skipped_steps: Steps skipped because of a loss or gradient that was not finite.
        training_loss: Mean loss over the training.
        trained_parameters: Number of trained parameters.
        lora_parameters: Number that plain LoRA of the same rank trains; None without an adapter.
        tokens: Tokens trained on, without padding.
        preparation_seconds: Time to add the adapter.
        training_seconds: Time of the training.
        evaluation_seconds: Time of both evaluations.
        peak_memory_bytes: Peak memory in bytes.
        peak_memory_of: The measured memory: CUDA tensors, or the process.
        shares: Share of layer updates won by each expert; empty without routing.
        routing: Interpretation of the routing; empty without routing.
        saved: Record of the saved model: type, rounding, kept share of the update.
        print_error: Error after which progress and warnings were no longer printed; else empty.
        results: The table with the run's row; None if it could not be added.
        checkpoints: Record of the checkpoints: count, bytes, pause; empty without any.
        kernels: Executor of the optimizer's steps, eager or triton; None if it has no choice.
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
    print_error: str = ""
    results: Path | None = None
    checkpoints: dict[str, Any] = field(default_factory=dict)


def evaluation_record(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as in `eval.json`: metrics by name, then tables by name.

    NaN, an unknown end of an interval, becomes null, as JSON has no NaN.
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


def results_row(
    result: RunResult,
    settings: ResolvedSettings,
    started: datetime,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a run's row of `results.csv`.

    Args:
        result: The run.
        settings: Its settings.
        started: When it was started.
        identity: Version of the metrics, and hashes of data and base.
    """
    config = settings.method_config
    has_lora = config is not None or settings.has_adapter
    return {
        "run": result.directory.name,
        "started": started.isoformat(timespec="seconds"),
        "task": settings.task,
        "eval_part": settings.eval_part,
        "method": settings.method,
        "model": settings.model,
        "seed": settings.seed,
        **identity,
        # Empty cells, not zeros, where a method has no such value.
        "ranks": ",".join(map(str, config.ranks)) if config else "",
        "alpha": ",".join(f"{alpha:g}" for alpha in config.alphas) if config else "",
        "match": settings.match if settings.method in ADAPTERS else "",
        "trained_parameters": result.trained_parameters,
        "lora_parameters": result.lora_parameters or "",
        "score": config.score if config and settings.method in ROUTED else "",
        "learning_rate": settings.learning_rate if settings.trains_dense else "",
        "lora_learning_rate": settings.lora_learning_rate if has_lora else "",
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
