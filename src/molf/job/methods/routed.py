"""The base class of MoLF and MoLF-Efficient: experts, and the routing optimizer."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from molf.core.config import MoLFConfig
from molf.core.model.peft_model import with_adapter
from molf.core.optimizer import MoLFAdamW
from molf.core.trainer import trainer_optimizer
from molf.errors import InputError
from molf.job.methods.base import (
    Layer,
    Method,
    Plan,
    Prepared,
    TrainingData,
    config_of,
    find_adapted_layers,
)
from molf.job.settings.resolved import ResolvedSettings


class Routed(Method):
    """Methods whose optimizer routes each layer's update to one of its experts."""

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """Return the plan, with the factors of all experts and the trained dense weights."""
        layers = find_adapted_layers(model, settings)
        return Plan(layers, trained_parameters(model, layers, config_of(settings)))

    def prepared(self, model: Any, settings: ResolvedSettings, plan: Plan) -> Prepared:
        """Return a model, plain or with the experts' adapter, with the routing optimizer."""
        config = config_of(settings)
        lora_lr = settings.lora_learning_rate
        # The optimizer keeps LoRA rates as multiples of `lr`, which therefore must not be 0.
        lr = settings.learning_rate if settings.trains_dense else lora_lr
        return Prepared(
            model=model,
            optimizer=trainer_optimizer(
                config,
                lr=lr,
                lora_lr=lora_lr,
                weight_decay=settings.weight_decay,
                lora_weight_decay=settings.lora_weight_decay,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                **settings.optimizer_options.as_keywords(),
            ),
            optimizer_class=MoLFAdamW,
            layers=tuple(layer.name for layer in plan.layers),
            trained_parameters=plan.trained_parameters,
            experts=config.experts,
            rates={"lora_learning_rate": lora_lr / lr if settings.trains_dense else 1.0},
        )


def check_adapter(skeleton: Any, settings: ResolvedSettings) -> None:
    """Raise `InputError` if PEFT cannot adapt the skeleton, which is not usable afterwards."""
    try:
        with torch.device("meta"):
            add_adapter(skeleton, settings)
    except ValueError as error:
        raise InputError(f"method={settings.method}: {settings.model}: {error}") from error


def add_adapter(model: Any, settings: ResolvedSettings) -> Any:
    """Add the adapter of the experts to the model, and freeze the rest as configured."""
    with warnings.catch_warnings():
        # PEFT warns that it detects GPT-2's weights, stored as [in, out], itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return with_adapter(model, config_of(settings))


def trained_parameters(model: Any, layers: tuple[Layer, ...], config: MoLFConfig) -> int:
    """Return the number of trained parameters of a plain model and its experts."""
    total = sum(layer.lora_parameters(rank) for layer in layers for rank in config.ranks)
    weights = {model.get_submodule(layer.name).weight for layer in layers}
    for parameter in model.parameters():
        frozen = config.freeze_base if parameter in weights else config.freezes_rest
        if parameter.requires_grad and not frozen:
            total += parameter.numel()
    return total
