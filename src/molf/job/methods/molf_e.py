"""MoLF-Efficient: LoRA experts of different ranks, as slices of one adapter on a frozen base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from molf.job.methods.adapter import save_adapter
from molf.job.methods.base import Prepared, TrainingData
from molf.job.methods.routed import Routed, add_adapter, check_adapter
from molf.job.settings.resolved import ResolvedSettings


class MolfEfficient(Routed):
    """Routing between LoRA experts; the base may be quantised."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Check that layers match, and that PEFT can adapt them."""
        super().check(skeleton, settings)
        check_adapter(skeleton, settings)

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Add the experts' adapter; it is saved if nothing else is trained."""
        plan = self.plan(model, settings, data)
        prepared = self.prepared(add_adapter(model, settings), settings, plan)
        # An adapter alone is not the result if norms or embeddings are trained too.
        return prepared if settings.trains_dense else replace(prepared, save_adapter=save_adapter)
