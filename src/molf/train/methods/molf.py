"""MoLF: full-rank and low-rank experts of every layer under the optimizer that routes.

Folded where it can be, and then the model is as it is. LoRA dropout needs a branch to drop from:
then the LoRA experts are one adapter beside weights that are trained as well (the explicit form).
"""

from __future__ import annotations

from typing import Any

from molf.train.methods.base import Prepared, TrainingData
from molf.train.methods.routed import Routed, add_adapter, check_adapter
from molf.train.resolved import ResolvedSettings


class Molf(Routed):
    """The weights of every layer, and LoRA experts."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """The layers must be there; in the explicit form PEFT must be able to adapt them."""
        super().check(skeleton, settings)
        if settings.is_explicit:
            check_adapter(skeleton, settings)

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """The model as it is, or with the adapter.

        The weights move beside the adapter, so that it alone is not the result: it is not saved.
        """
        plan = self.plan(model, settings, data)
        if settings.is_explicit:
            model = add_adapter(model, settings)
        return self.prepared(model, settings, plan)
