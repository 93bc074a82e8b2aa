"""MoLF, folded: the model as it is, under the optimizer that routes."""

from __future__ import annotations

from typing import Any

from molf.core.optimizer import MoLFAdamW
from molf.core.trainer import trainer_optimizer
from molf.train.methods.base import (
    Layer,
    Method,
    Plan,
    Prepared,
    TrainingData,
    config_of,
    count_trainable,
    find_adapted_layers,
)
from molf.train.resolved import ResolvedSettings


class Molf(Method):
    """Full-rank and low-rank experts of every layer, folded into its weight."""

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """The dense weights and the factors, which are optimizer state."""
        layers = find_adapted_layers(model, settings)
        return Plan(layers, self._trained(model, layers, settings))

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """The model as it is."""
        layers = find_adapted_layers(model, settings)
        return Prepared(
            model=model,
            optimizer=trainer_optimizer(
                config_of(settings),
                lr=settings.learning_rate,
                lora_lr=settings.lora_learning_rate,
                weight_decay=settings.weight_decay,
                lora_weight_decay=settings.lora_weight_decay,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                nonfinite=settings.nonfinite,
            ),
            optimizer_class=MoLFAdamW,
            layers=tuple(layer.name for layer in layers),
            trained_parameters=self._trained(model, layers, settings),
            experts=config_of(settings).experts,
            rates={"lora_learning_rate": settings.lora_learning_rate / settings.learning_rate},
        )

    def _trained(self, model: Any, layers: tuple[Layer, ...], settings: ResolvedSettings) -> int:
        config = config_of(settings)
        factors = sum(layer.lora_parameters(rank) for layer in layers for rank in config.ranks)
        if not config.freeze_rest:
            return count_trainable(model) + factors
        modules = [model.get_submodule(layer.name) for layer in layers]
        return sum(count_trainable(module) for module in modules) + factors
