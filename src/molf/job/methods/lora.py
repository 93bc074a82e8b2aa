"""LoRA (Hu et al. 2021, arXiv 2106.09685), with or without rank-stabilised scaling.

Rank-stabilised scaling, `--use_rslora`, is that of Kalajdzievski 2023 (arXiv 2312.03732).
"""

from __future__ import annotations

from peft import LoraConfig

from molf.job.methods.adapter import Adapter, AdapterPlan, lora_config
from molf.job.settings.resolved import ResolvedSettings


class Lora(Adapter):
    """A `[rank, in]` starts random, B `[out, rank]` zero."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """Return PEFT's LoRA configuration."""
        return lora_config(plan, settings)
