"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the largest singular vectors.

The factors take the part of the weight that has the `rank` largest singular values, and the frozen
weight keeps the rest, so that at the start the product of both is the weight as it was.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from molf.errors import InputError
from molf.train.files import scratch_directory
from molf.train.methods.adapter import Adapter, AdapterPlan, lora_config
from molf.train.methods.base import Prepared, TrainingData
from molf.train.resolved import ResolvedSettings


class Pissa(Adapter):
    """PEFT's initialisation by an exact decomposition."""

    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """LoRA with that initialisation."""
        return lora_config(plan, settings, init_lora_weights="pissa")

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """As for any adapter; a rank too large is an error here, and needs no warning before it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Rank .* exceeds the smaller side")
            super().check(skeleton, settings)

    def check_layers(self, plan: AdapterPlan) -> None:
        """A matrix has no more singular values than its smaller side."""
        small = [x for x in plan.layers if plan.rank > min(x.in_features, x.out_features)]
        if small:
            side = min(small[0].in_features, small[0].out_features)
            raise InputError(
                f"method=pissa cannot give rank {plan.rank} to {len(small)} of "
                f"{len(plan.layers)} layers: {small[0].name} has {side} singular values. Give "
                "lower --ranks, or leave them out with --exclude_modules."
            )

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Keep what the adapter was at the start: the base model as others have it needs it."""
        prepared = super().prepare(model, settings, data)
        start = _Start(prepared.model)
        return replace(prepared, save_adapter=start.save_adapter)


class _Start:
    """The adapter as it was before the training, on disk until it has been used."""

    def __init__(self, model: Any) -> None:
        scratch = ExitStack()
        self._path = scratch.enter_context(scratch_directory("pissa")) / "initial"
        self._remove = weakref.finalize(self, scratch.close)
        model.save_pretrained(self._path)

    def save_adapter(self, model: Any, path: Path) -> None:
        """Write the change since then as plain LoRA of twice the rank, for the unchanged base.

        The frozen weight that the trained factors belong to is in no checkpoint.
        """
        with warnings.catch_warnings():
            # For a moment the model has both adapters, which is what PEFT warns of.
            warnings.filterwarnings("ignore", message="PiSSA changes the base weights")
            model.save_pretrained(path, path_initial_model_for_weight_conversion=str(self._path))
        self._remove()
