"""The three ways to train: what happens to the model, and which optimizer drives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from molf.core.config import MoLFConfig
from molf.core.layers import find_layers
from molf.core.optimizer import MoLFAdamW
from molf.core.trainer import trainer_optimizer
from molf.errors import InputError
from molf.train.resolved import ResolvedSettings


@dataclass(frozen=True)
class Prepared:
    """A model ready for the trainer.

    Attributes:
        model: The model to train; for lora, wrapped with its adapter.
        optimizer: The trainer's `optimizer_cls_and_kwargs`.
        optimizer_class: What the trainer must end up with.
        weight_decay: The trainer's own `weight_decay`, for the groups that it makes.
        layers: Names of the layers that are routed or adapted; empty for fft.
    """

    model: Any
    optimizer: tuple[Any, dict[str, Any]]
    optimizer_class: type[torch.optim.Optimizer]
    weight_decay: float
    layers: tuple[str, ...]


def adapted_layers(model: Any, settings: ResolvedSettings) -> tuple[str, ...]:
    """Names of the layers that the method routes or adapts; empty for fft.

    Raises:
        InputError: A pattern matches nothing, or no layer is left.
    """
    config = settings.method_config
    if config is None:
        return ()
    try:
        return tuple(layer.name for layer in find_layers(model, config))
    except ValueError as error:
        raise InputError(str(error)) from error


def prepare(model: Any, settings: ResolvedSettings) -> Prepared:
    """Make a float32 model ready to be trained with `settings.method`.

    Random initialisation depends on `settings.seed` alone.
    """
    return _PREPARE[settings.method](model, settings)


def finished(model: Any) -> Any:
    """Return the plain transformers model: a LoRA adapter is merged, in the model's float32."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _prepare_fft(model: Any, settings: ResolvedSettings) -> Prepared:
    return Prepared(
        model=model,
        optimizer=_adamw(settings, settings.learning_rate),
        optimizer_class=torch.optim.AdamW,
        weight_decay=settings.weight_decay,
        layers=(),
    )


def _prepare_lora(model: Any, settings: ResolvedSettings) -> Prepared:
    config = _config(settings)
    layers = adapted_layers(model, settings)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.ranks[0],
        lora_alpha=config.alphas[0],
        use_rslora=config.use_rslora,
        lora_dropout=config.lora_dropout,
        target_modules=list(layers),  # by name: the very layers that molf would route
    )
    torch.manual_seed(settings.seed)
    return Prepared(
        model=get_peft_model(model, lora),
        optimizer=_adamw(settings, settings.lora_learning_rate),
        optimizer_class=torch.optim.AdamW,
        weight_decay=settings.lora_weight_decay,
        layers=layers,
    )


def _prepare_molf(model: Any, settings: ResolvedSettings) -> Prepared:
    return Prepared(
        model=model,
        optimizer=trainer_optimizer(
            _config(settings),
            lr=settings.learning_rate,
            lora_lr=settings.lora_learning_rate,
            weight_decay=settings.weight_decay,
            lora_weight_decay=settings.lora_weight_decay,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            nonfinite=settings.nonfinite,
        ),
        optimizer_class=MoLFAdamW,
        weight_decay=settings.weight_decay,
        layers=adapted_layers(model, settings),
    )


def _adamw(settings: ResolvedSettings, learning_rate: float) -> tuple[Any, dict[str, Any]]:
    # For a class in the slot the trainer makes two groups, with and without decay (norms, biases).
    return torch.optim.AdamW, {
        "lr": learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "fused": True,
    }


def _config(settings: ResolvedSettings) -> MoLFConfig:
    config = settings.method_config
    if config is None:
        raise ValueError(f"method={settings.method} has no adapter.")
    return config


_PREPARE: dict[str, Callable[[Any, ResolvedSettings], Prepared]] = {
    "fft": _prepare_fft,
    "lora": _prepare_lora,
    "molf": _prepare_molf,
}
