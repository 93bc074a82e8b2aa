"""Estimate the bytes that a run will write, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from molf.job.methods import Plan
from molf.job.methods.base import config_of
from molf.job.settings.defaults import ADAPTERS, ROUTED
from molf.job.settings.resolved import ResolvedSettings

_MOMENTS = {"float32": 8.0, "8bit": 2.04}  # bytes for both moments of a number
_ROUTING_ROW = 11  # bytes per row of the Parquet log; measured 9.4 and 10.3 with random scores
_ROUTING_FRAME, _ROUTING_SHAPE = 4_000, 170  # bytes of a part, and of a layer's shape in it
_METRICS_LINE = 720  # bytes per line of metrics.jsonl; measured with three experts
_VALUES = 40_000  # bytes of numbers and random states in a checkpoint
_TENSOR = 1_600  # bytes per tensor of a checkpoint beside its numbers
_PREDICTION = 1000  # bytes per line of predictions.jsonl; an answer of 200 tokens


@dataclass(frozen=True)
class Needed:
    """Estimated bytes that a training will write.

    Attributes:
        checkpoint: Bytes of one checkpoint; 0 without checkpoints.
        at_the_end: Bytes of all files written after the training.
    """

    checkpoint: int = 0
    at_the_end: int = 0


def run_bytes(
    model: Any,
    settings: ResolvedSettings,
    plan: Plan,
    steps: int,
    *,
    beside: int = 0,
    stored: torch.dtype | None = None,
    evaluated: int = 0,
) -> dict[str, int]:
    """Estimate the bytes of a run's files, without the weights of `model/`.

    Args:
        model: The base model.
        settings: The run's settings.
        plan: The planned method.
        steps: Optimizer steps of the run.
        beside: Bytes of tokenizer and configurations, which each checkpoint contains.
        stored: The type that most of the base is stored in; None if it is not known.
        evaluated: Number of evaluated records.

    Returns:
        Bytes of the adapter, the low halves, the checkpoints that exist at the same time, the
        routing, and of metrics and predictions.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    factors = _factors(settings, plan)
    dense = plan.trained_parameters - factors
    adapts = dense == 0  # only an adapter is trained
    adapter = 4 * factors if adapts else 0
    low = 0
    if settings.keep_low_halves:
        # Weights that are not trained lose nothing if they were stored in bfloat16.
        alone = adapts and stored == torch.bfloat16
        low = 2 * (sum(x.in_features * x.out_features for x in plan.layers) if alone else weights)
    one = checkpoint_bytes(model, settings, plan, beside)
    lines = 2 + steps // settings.logging_steps
    return {
        "adapter": adapter,
        "lower halves": low,
        "checkpoints": one * _kept(settings, steps),
        "routing": _routing(settings, plan, steps),
        "metrics and predictions": lines * _METRICS_LINE + evaluated * _PREDICTION,
    }


def checkpoint_bytes(model: Any, settings: ResolvedSettings, plan: Plan, beside: int = 0) -> int:
    """Estimate the bytes of a checkpoint; 0 if the run has none.

    Args:
        model: The base model.
        settings: The run's settings.
        plan: The planned method.
        beside: Bytes of tokenizer and configurations.
    """
    if not settings.has_checkpoints:
        return 0
    factors = _factors(settings, plan)
    dense = plan.trained_parameters - factors
    half = settings.dtype == "bfloat16"
    exact = 2 if half and settings.weight_rounding == "exact" else 0
    width = 2 if half else 4
    # Factors and their moments are float32 for every `state_dtype`.
    size = 12 * factors + dense * (width + _MOMENTS[settings.state_dtype] + exact)
    size += _VALUES + _TENSOR * _state_tensors(model, plan, adapts=dense == 0)
    if settings.keeps_models:
        weights = sum(parameter.numel() for parameter in model.parameters())
        whole = weights * width + (8 * factors if settings.is_explicit else 0)
        size += beside + (whole if dense else 4 * factors)
    return int(size)


def needed(parts: Mapping[str, int], checkpoint: int) -> Needed:
    """Return the space to keep free during training.

    Args:
        parts: The result of `run_bytes`, and the model's bytes.
        checkpoint: The result of `checkpoint_bytes`.
    """
    later = sum(size for name, size in parts.items() if name not in ("checkpoints", "routing"))
    return Needed(checkpoint, later)


def _kept(settings: ResolvedSettings, steps: int) -> int:
    """Return the number of checkpoints that stay in the run, or exist beside those."""
    if settings.save_steps is None:
        return 0  # the run goes on without those of `save_minutes` if there is no room for them
    written = -(-steps // settings.save_steps)
    # One more than the limit: the oldest is deleted after the newest is written.
    return min(written, (settings.most_checkpoints or written) + 1)


def _state_tensors(model: Any, plan: Plan, *, adapts: bool) -> int:
    """Return the number of tensors in a checkpoint: weights, two moments, and a fourth."""
    in_layers = 2 * len(plan.layers)
    return 4 * (in_layers if adapts else in_layers + sum(1 for _ in model.parameters()))


def _routing(settings: ResolvedSettings, plan: Plan, steps: int) -> int:
    if settings.method not in ROUTED:
        return 0
    rows = steps * len(plan.layers) * len(config_of(settings).experts)
    # A part is written each minute; most trainings have few, so that one frame is counted.
    return rows * _ROUTING_ROW + _ROUTING_FRAME + len(plan.layers) * _ROUTING_SHAPE


def _factors(settings: ResolvedSettings, plan: Plan) -> int:
    """Return the number of elements in LoRA factors."""
    if settings.method == "fft":
        return 0
    if settings.method in ADAPTERS:
        return plan.trained_parameters
    if settings.method == "hybrid":
        return int(plan.details["adapter_parameters"])
    return sum(
        layer.lora_parameters(rank) for layer in plan.layers for rank in config_of(settings).ranks
    )
