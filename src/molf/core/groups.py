"""Parameter groups of the optimizer: one per routed layer, then what is not routed.

A group carries a layer's structure as plain values and refers to its parameters by position:
`[weight]` or `[weight, bias]` in the folded form, `[lora_A, lora_B]` after them, or alone, in the
adapter form, which the key `adapter_scaling` marks. Whatever swaps the parameters later
(accelerate, FSDP2) keeps positions, and whatever saves groups (state_dict, distributed checkpoints)
keeps plain values.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from molf.core.adapted import AdaptedLayer, adapter_layers, find_adapted
from molf.core.config import MoLFConfig
from molf.core.layers import LinearLayer, cleaner, find_layers, is_peft_model

_STRUCTURE = ("layer", "transposed", "ranks", "scalings", "adapter_scaling")
_NamedParameters = list[tuple[str, nn.Parameter]]
_ROUTED_KEYS = (
    "transposed",
    "ranks",
    "scalings",
    "score",
    "top_k",
    "seed",
    "lora_lr_ratios",
    "lora_weight_decays",
    "bias_weight_decay",
)


def build_groups(
    model: nn.Module,
    config: MoLFConfig,
    *,
    lr: float,
    lora_lr: float | Sequence[float] | None,
    weight_decay: float,
    lora_weight_decay: float | Sequence[float],
) -> list[dict[str, Any]]:
    """Return the groups for `MoLFAdamW`; the arguments are those of `MoLFAdamW.from_model`.

    Raises:
        ValueError: A value is not allowed, or no layer can be routed (see `find_layers` and
            `find_adapted`).
    """
    _check_range("lr", lr)
    lora_lrs = _per_expert("lora_lr", lr if lora_lr is None else lora_lr, config)
    lora_decays = _per_expert("lora_weight_decay", lora_weight_decay, config)
    common = {
        "ranks": config.ranks,
        "scalings": config.scalings,
        "score": config.score,
        "top_k": config.top_k,
        "seed": config.seed,
        "lora_lr_ratios": _ratios(lora_lrs, lr),
        "weight_decay": weight_decay,
        "lora_weight_decays": lora_decays,
        "bias_weight_decay": 0.0,
    }
    make = _adapter_groups if adapter_layers(model) else _folded_groups
    routed = [{**group, **common} for group in make(model, config)]
    rest = _rest_of(model, routed, config)
    if config.freezes_rest:
        if config.freeze_rest is None:
            _warn_of_freezing(rest)
        rest = []
    groups = routed + _rest_groups(rest, weight_decay)
    if make is _adapter_groups:
        _warn_of_saving([name for group in groups for name, _ in group["params"]])
    return groups


def _folded_groups(model: nn.Module, config: MoLFConfig) -> list[dict[str, Any]]:
    """Parameters and structure of each layer of a plain model."""
    _check_folded(model, config)
    layers = find_layers(model, config)
    if config.freeze_rest:
        layers = [dataclasses.replace(layer, bias=None) for layer in layers]
    return [
        {
            "params": _dense_parameters(layer),
            "layer": layer.name,
            "transposed": layer.transposed,
        }
        for layer in layers
    ]


def _adapter_groups(model: nn.Module, config: MoLFConfig) -> list[dict[str, Any]]:
    """Parameters and structure of each layer that carries the trained adapter."""
    layers = find_adapted(model, config)
    clean = cleaner(model)
    groups: list[dict[str, Any]] = []
    for layer in layers:
        factors = [(clean(name), factor) for name, factor in (layer.A, layer.B)]
        groups.append(
            {
                "params": _dense_parameters(layer) + factors,
                "layer": layer.name,
                "transposed": False,  # PEFT's factors never are
                "adapter_scaling": layer.scaling,
            }
        )
    return groups


def _check_folded(model: nn.Module, config: MoLFConfig) -> None:
    """Refuse settings that a model without LoRA layers cannot have."""
    if is_peft_model(model):
        raise ValueError(
            "The model is a PEFT model without a LoRA layer. Give the plain model, or one with the "
            "adapter of molf.peft_config(config)."
        )
    if config.freeze_base:
        raise ValueError(
            "freeze_base=True (MoLF-Efficient) trains a LoRA adapter, and the model has none. Call "
            "molf.with_adapter(model, config) first."
        )
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout={config.lora_dropout} cannot be folded into the weight: it needs an "
            "adapter. Call molf.with_adapter(model, config) first, or use lora_dropout=0."
        )


def _per_expert(name: str, value: float | Sequence[float], config: MoLFConfig) -> tuple[float, ...]:
    count = len(config.ranks)
    values: tuple[Any, ...] = (value,) * count
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value)
    if len(values) != count:
        raise ValueError(
            f"Invalid {name}={list(values)}. Must be one number, or one per rank ({count} ranks)."
        )
    for one in values:
        _check_range(name, one)
    return values


def _ratios(lora_lrs: tuple[float, ...], lr: float) -> tuple[float, ...]:
    """Rates of the LoRA experts as multiples of `lr`."""
    if lr == 0:
        if any(lora_lrs):
            raise ValueError(
                f"Invalid lora_lr={list(lora_lrs)} with lr=0. The LoRA rate is kept as a ratio to "
                "lr, so lr must be positive; a scheduler may bring it to 0."
            )
        return (1.0,) * len(lora_lrs)
    return tuple(rate / lr for rate in lora_lrs)


def _dense_parameters(layer: LinearLayer | AdaptedLayer) -> _NamedParameters:
    prefix = f"{layer.name}." if layer.name else ""  # the model may be a linear layer itself
    dense = (("weight", layer.weight), ("bias", layer.bias))
    return [(f"{prefix}{end}", parameter) for end, parameter in dense if parameter is not None]


def _rest_of(
    model: nn.Module, routed: list[dict[str, Any]], config: MoLFConfig
) -> _NamedParameters:
    """Trainable parameters that no routed layer has; no frozen base weight, no other adapter."""
    taken = {parameter for group in routed for _, parameter in group["params"]}
    for tuner in adapter_layers(model).values():
        for name, parameter in tuner.named_parameters():
            is_base = name == "base_layer.weight"
            if (is_base and config.freeze_base) or name.startswith("lora_"):
                taken.add(parameter)
    clean = cleaner(model)
    return [
        (clean(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in taken
    ]


def _rest_groups(rest: _NamedParameters, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of what is not routed, with and without decay."""
    groups = [
        {"params": [x for x in rest if x[1].dim() >= 2], "weight_decay": weight_decay},
        {"params": [x for x in rest if x[1].dim() < 2], "weight_decay": 0.0},  # norms, biases
    ]
    return [group for group in groups if group["params"]]


def _warn_of_freezing(rest: _NamedParameters) -> None:
    if rest:
        warnings.warn(
            f"freeze_base=True freezes {len(rest)} trainable parameters outside the adapter as "
            f"well (first: {rest[0][0]}). freeze_rest=False trains them with plain AdamW steps; "
            "freeze_rest=True says that this is meant.",
            stacklevel=3,
        )


def _warn_of_saving(names: list[str]) -> None:
    """Warn of what is trained and not in the adapter, which is all that PEFT saves."""
    saved = ("lora_", "modules_to_save", "trainable_tokens", "bias")
    lost = [name for name in names if not any(part in name for part in saved)]
    if lost:
        warnings.warn(
            f"{len(lost)} trained parameters are outside the adapter (first: {lost[0]}), and "
            "PEFT's save_pretrained, which trainers call for checkpoints, saves the adapter alone. "
            "Keep model.state_dict() for checkpoints and molf.merge(model) for the result.",
            stacklevel=4,
        )


def check_group(group: dict[str, Any]) -> None:
    """Check every number of a group, given or filled in.

    Raises:
        ValueError: The first number out of range.
    """
    for name in ("lr", "eps", "weight_decay", "bias_weight_decay"):
        _check_range(name, group.get(name, 0.0))
    if group.get("adapter_scaling") is not None and not group["adapter_scaling"] > 0:
        raise ValueError(f"Invalid adapter_scaling={group['adapter_scaling']!r}. Must be positive.")
    for name in ("lora_lr_ratios", "lora_weight_decays"):
        for value in group.get(name, ()):
            _check_range(name, value)
    if group["layer"] is not None:
        missing = [key for key in _ROUTED_KEYS if key not in group]
        if missing:
            raise ValueError(
                f"The group of layer {group['layer']!r} lacks {', '.join(missing)}. Build routed "
                "groups with MoLFAdamW.from_model(model, config)."
            )
    betas = group["betas"]
    is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not is_pair or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
        raise ValueError(f"Invalid betas={betas!r}. Must be two numbers in [0, 1).")
    if any(parameter.is_complex() for parameter in group["params"]):
        raise ValueError("MoLFAdamW does not support complex parameters.")


def _check_range(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError(f"Invalid {name}={value!r}. Must be a finite number, at least 0.")


def check_same_structure(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Refuse saved groups that were built for other layers or experts.

    Raises:
        ValueError: The first difference.
    """
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"Cannot load the optimizer state: it has {len(saved_groups)} parameter groups, this "
            f"optimizer has {len(groups)}."
        )
    for saved, own in zip(saved_groups, groups, strict=True):
        for key in _STRUCTURE:
            given, expected = saved.get(key), own.get(key)
            if _plain(given) != _plain(expected):
                raise ValueError(
                    f"Cannot load the optimizer state: a group has {key}={given!r} where this "
                    f"optimizer has {expected!r}."
                )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value
