"""Parameter groups of the optimizer: one per routed layer, then the parameters not routed.

Parameters of a routed group: `[weight]` or `[weight, bias]` in the folded form; in the adapter form
(key `adapter_scaling`) `[lora_A, lora_B]` after them, or alone. All other entries are plain values.
"""

# Positions and plain values, because libraries that replace parameters (accelerate, FSDP2) keep
# positions, and libraries that save groups (distributed checkpoints) keep plain values.

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from molf.core.config import MoLFConfig
from molf.core.hyper_parameters import number, pair_of_betas
from molf.core.model.adapted_layers import (
    AdaptedLayer,
    adapter_layers,
    find_adapted,
    trained_adapter,
)
from molf.core.model.coverage import Coverage, coverage_of, warn_of_unrouted
from molf.core.model.decay import undecayed
from molf.core.model.linear_layers import LinearLayer, find_layers
from molf.core.model.module_names import cleaner, is_peft_model, unwrapped
from molf.core.model.weight_checks import check_has_values
from molf.core.scores.registry import routing
from molf.core.scores.rules import BestShare
from molf.inputs import is_integer
from molf.shown import counted

NamedParameters = list[tuple[str, nn.Parameter]]
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
    lr: float | Tensor,
    lora_lr: float | Sequence[float] | None,
    weight_decay: float,
    lora_weight_decay: float | Sequence[float],
) -> list[dict[str, Any]]:
    """Return the groups for `MoLFAdamW`; the arguments are those of `MoLFAdamW.from_model`.

    Raises:
        ValueError: A value is not allowed, or no layer can be routed (see `find_layers` and
            `find_adapted`).
    """
    rate = number("lr", lr, smallest=0)
    lora_lrs = _per_expert("lora_lr", rate if lora_lr is None else lora_lr, config)
    lora_decays = _per_expert("lora_weight_decay", lora_weight_decay, config)
    common = {
        "ranks": config.ranks,
        "scalings": config.scalings,
        "score": config.score,
        "top_k": config.top_k,
        "seed": config.seed,
        "lora_lr_ratios": _ratios(lora_lrs, rate),
        "weight_decay": weight_decay,
        "lora_weight_decays": lora_decays,
        "bias_weight_decay": 0.0,
    }
    # The model decides about the form: an adapter holds the experts, or the weight does.
    make = _adapter_groups if adapter_layers(model) else _folded_groups
    routed = [{**common, **group} for group in make(model, config)]
    rest = _rest_of(model, routed, config)
    if config.freezes_rest:
        if config.freeze_rest is None:
            _warn_of_freezing([x for x in rest if not _is_adapter_bias(x[0])])
        # `freeze_base` alone does not freeze biases of the adapter: the user asked for them with
        # the adapter, and they belong to no expert and not to the base.
        rest = [] if config.freeze_rest else [x for x in rest if _is_adapter_bias(x[0])]
    groups = routed + plain_groups(model, rest, weight_decay)
    for group in groups:
        for name, parameter in group["params"]:
            check_has_values(name, parameter)
    if make is _adapter_groups:
        warn_of_saving(model, [name for group in groups for name, _ in group["params"]])
    return groups


def cover(model: nn.Module, groups: list[dict[str, Any]], config: MoLFConfig) -> Coverage:
    """Count the parameters of a model that the groups of `build_groups` route.

    Warns:
        UserWarning: The model has matrices that cannot be routed (`warn_of_unrouted`), or a share
            of its layers rounds to none or all of them.
    """
    layers = {group["layer"]: group for group in groups if group["layer"] is not None}
    uses_adapter = bool(adapter_layers(model))
    coverage = coverage_of(
        model,
        {p for group in layers.values() for p in group["params"]},
        len(layers),
        trains_rest=not config.freezes_rest,
        uses_adapter=uses_adapter,
        adapted=layers if uses_adapter else (),
    )
    warn_of_unrouted(coverage)
    _warn_of_share(config.score, len(layers))
    return coverage


def _warn_of_share(score: str, layers: int) -> None:
    """Warn of a score `share:Q:SCORE` that gives `full` no layer or all of them."""
    rule = routing(score).rule
    if isinstance(rule, BestShare) and (count := rule.count(layers)) in (0, layers):
        outcome = "none: LoRA" if count == 0 else "all: full"
        warnings.warn(
            f"score={score}: {rule.share:g} of {counted(layers, 'routed layer')} rounds to "
            f"{outcome} takes every update, without a choice between layers.",
            stacklevel=4,
        )


def _folded_groups(model: nn.Module, config: MoLFConfig) -> list[dict[str, Any]]:
    """Return the routed groups of a plain model."""
    _check_folded(model, config)
    layers = find_layers(model, config)
    if config.freeze_rest:
        layers = [dataclasses.replace(layer, bias=None) for layer in layers]
    return [
        {
            "params": _dense_parameters(layer),
            "layer": layer.name,
            "transposed": layer.transposed,
            **_marked_decays(layer.weight, config),
        }
        for layer in layers
    ]


def _adapter_groups(model: nn.Module, config: MoLFConfig) -> list[dict[str, Any]]:
    """Return the routed groups of a PEFT model."""
    layers = find_adapted(model, config)
    clean = cleaner(model)
    groups: list[dict[str, Any]] = []
    for layer in layers:
        factors = [(clean(name), factor) for name, factor in (layer.A, layer.B)]
        groups.append(
            {
                "params": _dense_parameters(layer) + factors,
                "layer": layer.name,
                "transposed": False,  # PEFT's factors are never transposed
                "adapter_scaling": layer.scaling,
            }
        )
    return groups


def _check_folded(model: nn.Module, config: MoLFConfig) -> None:
    """Refuse settings that need a LoRA adapter."""
    if is_peft_model(model):
        inner: Any = unwrapped(model)
        kinds = {
            str(getattr(c.peft_type, "value", c.peft_type)) for c in inner.peft_config.values()
        }
        raise ValueError(
            f"The model is a PEFT model without a LoRA layer ({', '.join(sorted(kinds))}): experts "
            "are slices of a LoRA adapter. Give the plain model, or one with the adapter of "
            "molf.peft_config(config)."
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
    if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist"):  # a tensor, a NumPy array
        value = value.tolist()
    values: tuple[Any, ...] = (value,) * count
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value)
    if len(values) != count:
        raise ValueError(
            f"Invalid {name}={list(values)}. Must be one number, or one per rank ({count} ranks)."
        )
    return tuple(number(name, value, smallest=0) for value in values)


def _ratios(lora_lrs: tuple[float, ...], lr: float) -> tuple[float, ...]:
    """Return the learning rates of the LoRA experts as multiples of `lr`."""
    if lr == 0:
        if any(lora_lrs):
            raise ValueError(
                f"Invalid lora_lr={list(lora_lrs)} with lr=0. The LoRA rate is kept as a ratio to "
                "lr, so lr must be positive; a scheduler may set it to 0."
            )
        # All rates are 0: any ratio gives 0.
        return (1.0,) * len(lora_lrs)
    return tuple(rate / lr for rate in lora_lrs)


def _dense_parameters(layer: LinearLayer | AdaptedLayer) -> NamedParameters:
    dense = ((layer.weight_name, layer.weight), (layer.bias_name, layer.bias))
    return [(name, parameter) for name, parameter in dense if parameter is not None]


def _marked_decays(weight: nn.Parameter, config: MoLFConfig) -> dict[str, Any]:
    """Return zero decays for a layer whose weight the model marks with `_no_weight_decay`."""
    if not getattr(weight, "_no_weight_decay", False):
        return {}
    return {"weight_decay": 0.0, "lora_weight_decays": (0.0,) * len(config.ranks)}


def _rest_of(model: nn.Module, routed: list[dict[str, Any]], config: MoLFConfig) -> NamedParameters:
    """Return the trainable parameters outside the routed layers, base weights and adapters."""
    taken = {parameter for group in routed for _, parameter in group["params"]}
    tuners = adapter_layers(model)
    bias = f"lora_B.{trained_adapter(tuners)}.bias" if tuners else ""
    for tuner in tuners.values():
        for name, parameter in tuner.named_parameters():
            # Its bias is not routed and may be trained; other adapters stay as they are.
            is_base = name == "base_layer.weight"
            if (is_base and config.freeze_base) or (name.startswith("lora_") and name != bias):
                taken.add(parameter)
    clean = cleaner(model)
    return [
        (clean(name), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in taken
    ]


def _is_adapter_bias(name: str) -> bool:
    """Return whether a parameter is a bias of `LoraConfig(lora_bias=True)`."""
    return ".lora_B." in name and name.endswith(".bias")


def plain_groups(
    model: nn.Module, named: NamedParameters, weight_decay: float
) -> list[dict[str, Any]]:
    """Return the groups of parameters that are not routed, with and without decay."""
    without = undecayed(model)
    groups = [
        {"params": [x for x in named if x[1] not in without], "weight_decay": weight_decay},
        {"params": [x for x in named if x[1] in without], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _warn_of_freezing(rest: NamedParameters) -> None:
    if rest:
        warnings.warn(
            f"freeze_base=True also freezes {counted(len(rest), 'trainable parameter')} outside "
            f"the adapter (first: {rest[0][0]}). Set freeze_rest=False to train with plain AdamW "
            "outside the adapter, or freeze_rest=True to omit this warning.",
            stacklevel=3,
        )


def warn_of_saving(model: nn.Module, names: list[str]) -> None:
    """Warn of trained parameters outside the adapter, if the model does not save them.

    Args:
        model: A PEFT model.
        names: Names of the trained parameters in the plain model.
    """
    from molf.core.model.peft_saving import saved_beside

    saved, beside = ("lora_", "modules_to_save", "trainable_tokens", "bias"), saved_beside(model)
    lost = [x for x in names if x not in beside and not any(part in x for part in saved)]
    if lost:
        warnings.warn(
            f"{counted(len(lost), 'trained parameter')} outside the adapter (first: {lost[0]}): "
            "PEFT's save_pretrained, which trainers call for checkpoints, saves the adapter only. "
            "Resuming from one starts the others at the base's values. Models of molf.with_adapter "
            "and molf.with_assignment save all parameters that are trained there. Otherwise keep "
            "model.state_dict() beside the checkpoint and load it before, and give TRL's "
            "DPOTrainer a ref_model: its own reference would be beside trained weights.",
            stacklevel=4,
        )


def check_group(group: dict[str, Any], *, smallest: float = 0.0) -> None:
    """Check every number of a group.

    Args:
        group: Group with all defaults.
        smallest: Smallest allowed rate or decay.

    Raises:
        ValueError: For the first number out of range.
    """
    for name in ("lr", "eps", "weight_decay", "bias_weight_decay"):
        number(name, group.get(name, 0.0), smallest=smallest)
    if not is_integer(seed := group.get("seed", 0)):
        raise ValueError(f"Invalid seed={seed!r}. Must be an integer.")
    if group.get("adapter_scaling") is not None and not group["adapter_scaling"] > 0:
        raise ValueError(f"Invalid adapter_scaling={group['adapter_scaling']!r}. Must be positive.")
    if group["layer"] is not None:
        missing = [key for key in _ROUTED_KEYS if key not in group]
        if missing:
            raise ValueError(
                f"The group of layer {group['layer']!r} lacks {', '.join(missing)}. Build routed "
                "groups with MoLFAdamW.from_model(model, config)."
            )
        _check_experts(group, smallest)
        if any(parameter.is_complex() for parameter in group["params"]):
            raise ValueError(f"Layer {group['layer']}: complex weights cannot be routed.")
        if number("eps", group["eps"]) == 0:
            # While B = 0 the gradient of A is zero, and its step would be 0 / 0.
            raise ValueError(
                f"Invalid eps=0 of layer {group['layer']!r}: a factor without a gradient so far "
                "would become NaN. Must be positive."
            )
        check_shapes(group)
    pair_of_betas(group["betas"])
    for place, parameter in enumerate(group["params"]):
        if not is_lazy(parameter) and parameter.is_conj():  # lazy parameters have no shape yet
            raise ValueError(
                f"{parameter_name(group, place)} is a conjugate view, into which no step can "
                "write. Give parameter.resolve_conj()."
            )


def differences(group: dict[str, Any]) -> list[str]:
    """Return the options of torch's optimizers in a group that no step here has; none if unset."""
    found = [key for key in ("amsgrad", "maximize") if group.get(key)]
    if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
        found.append("weight decay that is not decoupled")
    return found


def _check_experts(group: dict[str, Any], smallest: float) -> None:
    """Check the experts of a routed group."""
    ranks = group["ranks"]
    in_adapter = group.get("adapter_scaling") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model's configuration has warned, once for all layers
        MoLFConfig(  # its constructor checks the values
            ranks=ranks,
            score=group["score"],
            top_k=group["top_k"],
            seed=group["seed"],
            freeze_base=in_adapter and len(group["params"]) == 2,
        )
    for name in ("scalings", "lora_lr_ratios", "lora_weight_decays"):
        if not isinstance(group[name], Sequence) or len(group[name]) != len(ranks):
            raise ValueError(
                f"Invalid {name}={group[name]!r} of layer {group['layer']!r}. Must be one number "
                f"per rank ({len(ranks)} ranks)."
            )
        for value in group[name]:
            number(name, value, smallest=smallest)


def check_shapes(group: dict[str, Any]) -> None:
    """Check that a routed group has the tensors of one layer: [weight, bias, lora_A, lora_B].

    Raises:
        ValueError: With the layer's name.
    """
    shapes = [tuple(parameter.shape) for parameter in group["params"]]
    if not _are_of_one_layer(shapes, group):
        raise ValueError(
            f"The group of layer {group['layer']!r} has tensors of shape "
            f"{', '.join(map(str, shapes)) or 'none'}. Must be a weight with two sides and "
            "optionally its bias, followed by the adapter's two factors in the adapter form, all "
            "whole: were they flattened or split (FSDP, DeepSpeed)?"
        )


def _are_of_one_layer(shapes: list[tuple[int, ...]], group: dict[str, Any]) -> bool:
    """Return whether the shapes of a routed group are those of whole tensors of one layer."""
    in_adapter = group.get("adapter_scaling") is not None
    dense, factors = (shapes[:-2], shapes[-2:]) if in_adapter else (shapes, [])
    if len(dense) > 2 or any(len(shape) != 2 for shape in (*dense[:1], *factors)):
        return False
    if in_adapter:
        if len(factors) != 2 or not factors[0][0] == factors[1][1] == sum(group["ranks"]):
            return False
        out_features, in_features = factors[1][0], factors[0][1]
        # The base may be a Conv1D, whose weight is [in, out].
        sides = ((out_features, in_features), (in_features, out_features))
        if dense and dense[0] not in sides:
            return False
    elif dense:
        out_features = dense[0][1 if group["transposed"] else 0]
    else:
        return False
    return dense[1:] in ([], [(out_features,)])


def parameter_name(group: dict[str, Any], index: int, number: int | None = None) -> str:
    """Return a parameter's name, or its position if it has none, for messages and seeds.

    Args:
        group: Group of the parameter.
        index: Position in the group.
        number: Number of the group in the optimizer; not needed for a routed layer.
    """
    if names := group.get("param_names"):
        return str(names[index])
    if group["layer"] is not None:
        return f"{group['layer']} [{index}]"
    return f"parameter [{index}] of group {number}"


def dense_parameters(group: dict[str, Any]) -> list[Tensor]:
    """Return a group's parameters without the factors of an adapter, which come last."""
    parameters: list[Tensor] = list(group["params"])
    return parameters if group.get("adapter_scaling") is None else parameters[:-2]


def name_by_place(group: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Name the parameters of a new group, or of the existing ones, if only the others have names.

    Args:
        group: Argument of `add_param_group`.
        groups: Groups in the optimizer.
    """
    # torch's optimizers need names for all groups or for none.
    given = group.get("params")
    if not groups or isinstance(given, set) or not isinstance(given, (Tensor, Iterable)):
        return  # torch refuses collections without an order
    group["params"] = params = [given] if isinstance(given, Tensor) else list(given)
    is_named = "param_names" in group or any(isinstance(entry, tuple) for entry in params)
    if is_named == ("param_names" in groups[0]):
        return
    nameless = groups if is_named else [{"layer": None, **group}]
    for index, unnamed in enumerate(nameless, 0 if is_named else len(groups)):
        names = [parameter_name(unnamed, place, index) for place in range(len(unnamed["params"]))]
        (unnamed if is_named else group)["param_names"] = names
