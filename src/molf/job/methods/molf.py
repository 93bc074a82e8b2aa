"""MoLF: full-rank and low-rank experts of each layer, with the routing optimizer.

In the folded form the model is unchanged. LoRA dropout needs a separate branch, so with dropout the
LoRA experts are one adapter beside weights that are trained as well (the explicit form).
"""

from __future__ import annotations

from typing import Any

from molf.job.methods.base import Prepared, TrainingData
from molf.job.methods.routed import Routed, add_adapter, check_adapter
from molf.job.settings.resolved import ResolvedSettings


class Molf(Routed):
    """Routing between the weights of each layer and LoRA experts."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Check that layers match, and, in the explicit form, that PEFT can adapt them."""
        super().check(skeleton, settings)
        if settings.is_explicit:
            check_adapter(skeleton, settings)

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Return the model, with the adapter in the explicit form.

        The adapter is not saved, because the weights beside it are trained as well.
        """
        plan = self.plan(model, settings, data)
        if settings.is_explicit:
            model = add_adapter(model, settings)
        return self.prepared(model, settings, plan)
