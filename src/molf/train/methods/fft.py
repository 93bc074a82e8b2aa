"""Full fine-tuning: AdamW on all weights."""

from __future__ import annotations

from typing import Any

import torch

from molf.train.methods.base import Method, Plan, Prepared, TrainingData, count_trainable
from molf.train.resolved import ResolvedSettings


class FullFineTuning(Method):
    """Every weight moves; norms and biases do not decay."""

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """All parameters."""
        return Plan((), count_trainable(model))

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """The model as it is."""
        return Prepared(
            model=model,
            # For a class in the slot the trainer makes the groups with and without decay.
            optimizer=(
                torch.optim.AdamW,
                {
                    "lr": settings.learning_rate,
                    "betas": (settings.adam_beta1, settings.adam_beta2),
                    "eps": settings.adam_epsilon,
                    "fused": True,
                },
            ),
            optimizer_class=torch.optim.AdamW,
            layers=(),
            trained_parameters=count_trainable(model),
        )
