"""The base class of methods that train one PEFT adapter on a frozen base."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from molf.core.model.linear_layers import warn_of_large_ranks
from molf.errors import InputError, reason_of
from molf.job.methods.base import (
    Layer,
    Method,
    Plan,
    Prepared,
    TrainingData,
    config_of,
    count_trainable,
    find_adapted_layers,
)
from molf.job.methods.matching import matching_rank
from molf.job.settings.resolved import ResolvedSettings
from molf.ranks import ranks

_SHAPES = ("target_modules", "rank_pattern", "alpha_pattern")
"""Fields of PEFT's configuration that an initialisation may change."""


@dataclass(frozen=True)
class AdapterPlan(Plan):
    """A plan with an adapter.

    Attributes:
        rank: The adapter's rank: `ranks` of the settings, unless parameters are matched.
        scaling: The factor of its product, the same for any rank.
    """

    rank: int = 0
    scaling: float = 1.0


class Adapter(Method):
    """One PEFT adapter, on the layers that molf would route."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Add the adapter to a model without weights; PEFT raises an error if it cannot."""
        plan = self._plan(skeleton, settings)
        self.check_layers(plan)
        config = self.config(plan, settings, steps=100)
        config.init_lora_weights = False  # no weights to decompose
        try:
            with torch.device("meta"):
                get_peft_model(skeleton, config)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            _check_not_redirected(plan, config, settings)  # the likely cause, with a better message
            raise InputError(
                f"method={settings.method}: PEFT cannot adapt {settings.model}: {reason_of(error)}"
            ) from error
        _check_not_redirected(plan, config, settings)

    def check_layers(self, plan: AdapterPlan) -> None:
        """Raise `InputError` if a layer is too small for the method."""

    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> AdapterPlan:
        """Return the adapter's rank and size, and those of plain LoRA with the settings' rank."""
        return self._plan(model, settings)

    @abstractmethod
    def config(self, plan: AdapterPlan, settings: ResolvedSettings, steps: int) -> LoraConfig:
        """Return PEFT's configuration of the adapter."""

    def parameters(self, layer: Layer, rank: int) -> int:
        """Return the number of parameters that the adapter trains in a layer."""
        return layer.lora_parameters(rank)

    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Add the adapter to the model, and freeze all other parameters."""
        plan = self._plan(model, settings)
        config = self.config(plan, settings, data.steps)
        made: list[Any] = []

        def make() -> dict[str, Any]:
            # PEFT draws A from the global generator.
            torch.manual_seed(settings.seed)
            made.append(get_peft_model(model, config))
            self.initialise(made[0], plan, settings, data)
            own = made[0].peft_config["default"]
            return {name: getattr(own, name) for name in _SHAPES}

        if settings.fsdp is None:
            make()
        else:  # rank 0 has the values that initialise it, and the others take its shapes
            with torch.device("cpu"):
                shapes = ranks().on_main(make)
            if not made:
                for name, value in {**shapes, "init_lora_weights": False}.items():
                    setattr(config, name, value)
                made.append(get_peft_model(model, config))
        (wrapped,) = made
        return Prepared(
            model=wrapped,
            optimizer=(_AdapterAdamW, self.optimizer_arguments(settings)),
            optimizer_class=torch.optim.AdamW,
            layers=(),
            trained_parameters=count_trainable(wrapped),
            save_adapter=save_adapter,
        )

    def initialise(
        self, model: Any, plan: AdapterPlan, settings: ResolvedSettings, data: TrainingData
    ) -> None:
        """Initialise the adapter further than PEFT does; no-op by default."""

    def optimizer_arguments(self, settings: ResolvedSettings) -> dict[str, Any]:
        """Return AdamW's keywords."""
        return {
            "lr": settings.lora_learning_rate,
            "weight_decay": settings.lora_weight_decay,
            "betas": (settings.adam_beta1, settings.adam_beta2),
            "eps": settings.adam_epsilon,
            "fused": True,
        }

    def _plan(self, model: Any, settings: ResolvedSettings) -> AdapterPlan:
        layers = find_adapted_layers(model, settings)
        config = config_of(settings)

        def parameters(rank: int) -> int:
            return sum(self.parameters(layer, rank) for layer in layers)

        rank = config.ranks[0]
        lora_parameters = sum(layer.lora_parameters(rank) for layer in layers)
        if settings.match == "parameters":
            rank = matching_rank(parameters, lora_parameters)
        warn_of_large_ranks(layers, rank, in_adapter=True)
        return AdapterPlan(
            layers,
            parameters(rank),
            {"rank": rank, "lora_rank": config.ranks[0], "lora_parameters": lora_parameters},
            rank=rank,
            scaling=config.scalings[0],
        )


def _check_not_redirected(plan: AdapterPlan, config: Any, settings: ResolvedSettings) -> None:
    """Reject layers whose names PEFT would apply to fused experts, which cannot be merged."""
    # For mixtures whose experts were separate layers in transformers 4, PEFT applies the names of
    # those layers to the fused experts, even if a dense or shared expert has the name. It records
    # this in `config.target_parameters`.
    if not getattr(config, "target_parameters", None):
        return
    names = {layer.name for layer in plan.layers} - set(config.target_modules)
    endings = ",".join(sorted({name.rpartition(".")[2] for name in names}))
    raise InputError(
        f"method={settings.method}: PEFT would adapt the fused experts of {settings.model} in the "
        f"place of {len(names)} layers with names of theirs ({endings}). Leave these out with "
        f"--exclude_modules {endings}."
    )


def common_config(plan: AdapterPlan, settings: ResolvedSettings) -> dict[str, Any]:
    """Return the keywords of PEFT's configurations that are the same for all methods."""
    config = config_of(settings)
    return {
        "task_type": "CAUSAL_LM",
        "lora_dropout": config.lora_dropout,
        "target_modules": [layer.name for layer in plan.layers],
        "fan_in_fan_out": all(layer.transposed for layer in plan.layers),
    }


def lora_config(plan: AdapterPlan, settings: ResolvedSettings, **further: Any) -> LoraConfig:
    """Return PEFT's configuration of a LoRA adapter; `further` selects the kind."""
    config = config_of(settings)
    alpha = config.alphas[0]
    if plan.rank != config.ranks[0]:
        # A matched rank keeps the scaling of the given one.
        alpha = plan.scaling * (math.sqrt(plan.rank) if config.use_rslora else plan.rank)
    return LoraConfig(
        r=plan.rank,
        lora_alpha=alpha,
        use_rslora=config.use_rslora,
        **common_config(plan, settings),
        **further,
    )


def save_adapter(model: Any, path: Path) -> None:
    """Write the adapter with PEFT."""
    model.save_pretrained(path)


class _AdapterAdamW:
    """Builds AdamW for the trained parameters; vectors (DoRA's magnitudes) do not decay.

    A factory for the trainer's optimizer slot, see `molf.core.trainer`.
    """

    def __call__(
        self, model: nn.Module, *, weight_decay: float, **kwargs: Any
    ) -> torch.optim.AdamW:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]], **kwargs)
