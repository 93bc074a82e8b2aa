"""Training by an assignment: each layer in full, by LoRA or not at all, under one optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from molf.core.adamw import AdamW
from molf.core.assignment.assignment import Assignment
from molf.core.assignment.groups import assignment_groups
from molf.core.assignment.model import (
    assigned_parameters,
    rehearse_assignment,
    with_assignment,
)
from molf.core.model.linear_layers import head_name, is_in_head
from molf.core.model.linear_places import is_conv1d, linear_places
from molf.core.trainer import trainer_optimizer
from molf.errors import InputError
from molf.job.methods.adapter import save_adapter
from molf.job.methods.base import Layer, Method, Plan, Prepared, TrainingData, count_trainable
from molf.job.record.assignment_source import source_for
from molf.job.settings.resolved import ResolvedSettings


def assigned(settings: ResolvedSettings, skeleton: nn.Module) -> ResolvedSettings:
    """Return the settings with the assignment of method hybrid; others are returned as they are.

    Args:
        settings: The settings.
        skeleton: The plain model, with or without values; it is not changed.

    Raises:
        InputError: The assignment is that of another model, or a pattern does not fit it.

    Warns:
        UserWarning: Layers that no pattern names stay frozen.
    """
    if (source := source_for(settings)) is None:
        return settings
    found = source.assignment(skeleton)
    options = {"freeze_rest": settings.freeze_rest, "use_rslora": settings.use_rslora}
    return replace(settings, assigned=found.with_options(**options))


class Hybrid(Method):
    """Full training of some layers, and PEFT's adapter on others."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Put the assignment into a model without weights; warn of matrices that have no layer."""
        assignment, head = _assignment(settings), head_name(skeleton)
        with _locating(settings):
            for layer in assignment.lora:
                if is_in_head(layer.name, head):
                    raise ValueError(
                        f"Layer {layer.name} is the head and cannot be lora: TRL's loss uses its "
                        "weight without calling the layer. Make it full or frozen."
                    )
            rehearse_assignment(skeleton, assignment, use_dora=settings.use_dora)

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """Return the plan: layers with an adapter, and the number of layers of each kind."""
        assignment = _assignment(settings)
        with _locating(settings):
            trained = assigned_parameters(model, assignment, use_dora=settings.use_dora)
        places = {place.name: place.module for place in linear_places(model)}
        layers = tuple(
            Layer(one.name, one.shape[1], one.shape[0], is_conv1d(places[one.name]))
            for one in assignment.lora
        )
        factors = sum(
            one.factors + (one.shape[0] if settings.use_dora else 0) for one in assignment.lora
        )
        return Plan(
            layers,
            sum(parameter.numel() for parameter in trained) + factors,
            {
                "full_layers": len(assignment.full),
                "frozen_layers": len(assignment.frozen),
                "full_share": round(assignment.share, 6),
                "adapter_parameters": factors,
            },
        )

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Put the assignment into the model; the adapter is saved if nothing else is trained."""
        torch.manual_seed(settings.seed)  # PEFT draws A from the global generator
        assignment = _assignment(settings)
        with warnings.catch_warnings(), _locating(settings):
            warnings.filterwarnings("ignore", message="All .* layers? are ")  # see `check`
            wrapped = with_assignment(
                model,
                assignment,
                use_dora=settings.use_dora,
                lora_dropout=float(settings.lora_dropout or 0.0),
            )
        has_dense = any(
            p.requires_grad and ".lora_" not in name for name, p in wrapped.named_parameters()
        )
        lr, lora_lr = settings.learning_rate, settings.lora_learning_rate
        options = settings.optimizer_options
        is_plain = options.is_plain(settings.dtype)
        if not has_dense:  # PEFT's factors are float32
            options = replace(options, weight_rounding=None)
        keywords: dict[str, Any] = {
            "lr": lr,
            "lora_lr": lora_lr,
            "weight_decay": settings.weight_decay,
            "lora_weight_decay": settings.lora_weight_decay,
            "betas": (settings.adam_beta1, settings.adam_beta2),
            "eps": settings.adam_epsilon,
        }
        optimizer: tuple[Any, dict[str, Any]] = (
            _TorchAdamW,
            {"assignment": assignment, **keywords},
        )
        if not is_plain:
            optimizer = trainer_optimizer(
                assignment, seed=settings.seed, **options.as_keywords(), **keywords
            )
        has_both = has_dense and bool(assignment.lora)
        return Prepared(
            model=wrapped,
            optimizer=optimizer,
            optimizer_class=torch.optim.AdamW if is_plain else AdamW,
            layers=(),
            trained_parameters=count_trainable(wrapped),
            save_adapter=None if has_dense else save_adapter,
            rates={"lora_learning_rate": lora_lr / lr} if has_both else {},
        )


class _TorchAdamW:
    """Builds torch's fused AdamW, faster than molf's and with the same numbers, as fft does.

    A factory for the trainer's optimizer slot, see `molf.core.trainer`.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float],
        eps: float,
        **kwargs: Any,
    ) -> torch.optim.AdamW:
        groups = assignment_groups(model, **kwargs)
        for group in groups:
            group.pop("state_dtype", None)
        return torch.optim.AdamW(groups, lr=kwargs["lr"], betas=betas, eps=eps, fused=True)


def _assignment(settings: ResolvedSettings) -> Assignment:
    assignment = settings.reached_assignment
    assert assignment is not None, "set by `assigned`"
    return assignment


@contextmanager
def _locating(settings: ResolvedSettings) -> Iterator[None]:
    """Convert errors of the assignment to `InputError`, with its path."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"assignment {settings.assignment}: {error}") from error
