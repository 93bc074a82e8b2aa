"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA initialised with the top singular vectors.

The factors hold the part of the weight with the `rank` largest singular values, and the frozen
weight the rest. At the start their sum is the original weight.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from molf.disk.files import scratch_directory
from molf.errors import InputError
from molf.job.methods.adapter import Adapter, AdapterPlan, lora_config
from molf.job.methods.base import Prepared, TrainingData, has_values
from molf.job.settings.resolved import ResolvedSettings


class Pissa(Adapter):
    """LoRA with PEFT's initialisation by an exact SVD."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """Return PEFT's LoRA configuration with this initialisation."""
        return lora_config(plan, settings, init_lora_weights="pissa")

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Check that PEFT can adapt the layers, and that they are large enough."""
        # Here a large rank is an error, so the warning is not needed.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Rank .* exceeds the smaller side")
            super().check(skeleton, settings)

    def check_layers(self, plan: AdapterPlan) -> None:
        """Reject layers with fewer singular values than the rank."""
        small = [x for x in plan.layers if plan.rank > min(x.in_features, x.out_features)]
        if small:
            side = min(small[0].in_features, small[0].out_features)
            raise InputError(
                f"method=pissa cannot give rank {plan.rank} to {len(small)} of "
                f"{len(plan.layers)} layers: {small[0].name} has {side} singular values. Give "
                "lower --ranks, or leave them out with --exclude_modules."
            )

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Add the adapter, and store its initial weights, which saving needs."""
        prepared = super().prepare(model, settings, data)
        if not has_values(prepared.model):  # rank 0 saves
            return prepared
        start = _Start(prepared.model)
        return replace(prepared, save_adapter=start.save_adapter)


class _Start:
    """The adapter's initial weights, on disk until the trained adapter is saved."""

    def __init__(self, model: Any) -> None:
        # Closed by `finalize`, also when the training fails before the adapter is saved.
        scratch = ExitStack()
        self._path = scratch.enter_context(scratch_directory("pissa")) / "initial"
        self._remove = weakref.finalize(self, scratch.close)
        model.save_pretrained(self._path)

    def save_adapter(self, model: Any, path: Path) -> None:
        """Write the trained change as plain LoRA of twice the rank, for the original base."""
        # The trained factors need the changed frozen weight, which no checkpoint contains.
        with warnings.catch_warnings():
            # PEFT warns because it loads the initial adapter beside the trained one.
            warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
            model.save_pretrained(path, path_initial_model_for_weight_conversion=str(self._path))
        self._remove()
