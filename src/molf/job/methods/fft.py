"""Full fine-tuning: AdamW on all weights."""

from __future__ import annotations

from typing import Any

import torch

from molf.core.adamw import AdamW
from molf.job.methods.base import Method, Plan, Prepared, TrainingData, count_trainable
from molf.job.settings.resolved import ResolvedSettings


class FullFineTuning(Method):
    """AdamW on all weights; norms and biases do not decay."""

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """Return the plan, with all parameters."""
        return Plan((), count_trainable(model))

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Return the model unchanged, with AdamW."""
        optimizer_class, options = _optimizer(settings)
        return Prepared(
            model=model,
            # Given a class, the trainer creates the groups with and without decay.
            optimizer=(
                optimizer_class,
                {
                    "lr": settings.learning_rate,
                    "betas": (settings.adam_beta1, settings.adam_beta2),
                    "eps": settings.adam_epsilon,
                    **options,
                },
            ),
            optimizer_class=optimizer_class,
            layers=(),
            trained_parameters=count_trainable(model),
        )


def _optimizer(settings: ResolvedSettings) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Torch's fused AdamW where it has what is wanted, else the one that molf is made of."""
    options = settings.optimizer_options
    # torch's fused kernel is faster, and has no other storage.
    if options.is_plain(settings.dtype):
        return torch.optim.AdamW, {"fused": True}
    return AdamW, {"seed": settings.seed, **options.as_keywords()}
