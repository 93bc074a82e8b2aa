"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns at a multiple of A's rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from molf.job.methods.base import Prepared, TrainingData
from molf.job.methods.lora import Lora
from molf.job.settings.resolved import ResolvedSettings


class LoraPlus(Lora):
    """LoRA under PEFT's optimizer with two rates; `lora_learning_rate` is that of A."""

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Add the LoRA adapter, with the optimizer of two rates."""
        arguments = self.optimizer_arguments(settings)
        ratio = float(settings.loraplus_lr_ratio or 1)
        return replace(
            super().prepare(model, settings, data),
            optimizer=(_LoraPlusAdamW, {**arguments, "loraplus_lr_ratio": ratio}),
            rates={"lora_B_learning_rate": ratio},
        )


class _LoraPlusAdamW:
    """Creates the optimizer for the trainer's model, see `molf.core.trainer`."""

    def __call__(
        self, model: nn.Module, *, weight_decay: float, **kwargs: Any
    ) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, loraplus_weight_decay=weight_decay, **kwargs
        )
        return optimizer
