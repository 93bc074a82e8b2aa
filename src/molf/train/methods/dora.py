"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA for the direction of a weight, and its magnitude.

Each row of the weight, one per output, has a trained magnitude; LoRA moves its direction.
"""

from __future__ import annotations

from peft import LoraConfig

from molf.train.methods.adapter import Adapter, AdapterPlan, lora_config
from molf.train.methods.base import Layer
from molf.train.resolved import ResolvedSettings


class Dora(Adapter):
    """LoRA and a magnitude for each output."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """LoRA with PEFT's switch."""
        return lora_config(plan, settings, use_dora=True)

    def parameters(self, layer: Layer, rank: int) -> int:
        """The magnitudes count."""
        return layer.lora_parameters(rank) + layer.out_features
