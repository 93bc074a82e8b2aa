"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA updates directions, beside trained magnitudes.

Each row of the weight, one per output, has a trained magnitude. LoRA updates its direction.
"""

from __future__ import annotations

from peft import LoraConfig

from molf.job.methods.adapter import Adapter, AdapterPlan, lora_config
from molf.job.methods.base import Layer
from molf.job.settings.resolved import ResolvedSettings


class Dora(Adapter):
    """LoRA with a magnitude per output."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """Return PEFT's LoRA configuration with `use_dora`."""
        return lora_config(plan, settings, use_dora=True)

    def parameters(self, layer: Layer, rank: int) -> int:
        """Count the factors and the magnitudes."""
        return layer.lora_parameters(rank) + layer.out_features
