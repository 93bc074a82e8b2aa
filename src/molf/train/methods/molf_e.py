"""MoLF-Efficient: LoRA experts of different rank, slices of one plain adapter on a frozen base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from molf.train.methods.adapter import save_adapter
from molf.train.methods.base import Prepared, TrainingData
from molf.train.methods.routed import Routed, add_adapter, check_adapter
from molf.train.resolved import ResolvedSettings


class MolfEfficient(Routed):
    """LoRA experts alone; the base may be quantised."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """The layers must be there, and PEFT able to adapt them."""
        super().check(skeleton, settings)
        check_adapter(skeleton, settings)

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """The model with the experts' adapter; it is the result if nothing else is trained."""
        plan = self.plan(model, settings, data)
        prepared = self.prepared(add_adapter(model, settings), settings, plan)
        return prepared if settings.trains_dense else replace(prepared, save_adapter=save_adapter)
