"""Selection of the routed linear layers of a model."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from molf.core.config import MoLFConfig
from molf.core.model.linear_places import is_conv1d, linear_modules, linear_places
from molf.core.model.module_names import cleaner
from molf.core.model.weight_checks import check_real_weight, check_whole_weight, sides_of
from molf.core.model.wrappers import check_not_flattened

TASK_HEADS = ("score", "classifier", "qa_outputs")  # PEFT trains these whole by default


@dataclass(frozen=True)
class LinearLayer:
    """A routed linear layer of a model.

    Attributes:
        name: Name of the module, without prefixes of wrappers (DDP, compile, FSDP). For the first
            layers of `nn.MultiheadAttention`, which have no module, followed by `in_proj`.
        weight: [out, in], or [in, out] if `transposed`.
        bias: [out]; None if missing or frozen.
        transposed: True for GPT-2's `Conv1D`, which stores its weight as [in, out].
        weight_name: Name of the weight in the model.
        bias_name: Name of the bias; empty without one.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool
    weight_name: str
    bias_name: str

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.weight.shape[0 if self.transposed else 1]


def find_layers(model: nn.Module, config: MoLFConfig) -> list[LinearLayer]:
    """Return the linear layers of a plain `model` that `config` routes, in the model's order.

    These are every `nn.Linear`, every transformers `Conv1D` and the stacked q, k and v of every
    `nn.MultiheadAttention` with a trainable weight whose name matches `config.target_modules` and
    not `config.exclude_modules`. `"all-linear"` also excludes the head of a transformers model: its
    output layer, or else its `score`, `classifier` or `qa_outputs`.

    Raises:
        ValueError: No layer is routed; a pattern matches nothing; a matching layer shares its
            weight (a tied head) or its bias; or its weight is not a whole real matrix (quantised,
            complex, sparse, lazy, sharded).

    Warns:
        UserWarning: A rank exceeds a layer's smaller side.
    """
    layers = trainable_layers(model, config)
    warn_of_large_ranks(layers, max(config.ranks))
    return layers


def trainable_layers(
    model: nn.Module, config: MoLFConfig, *, in_adapter: bool = False
) -> list[LinearLayer]:
    """Return the layers as `find_layers` does, without warnings.

    Args:
        model: A plain model.
        config: Settings of the method.
        in_adapter: Whether an adapter will be added; then layers that are not called are left out.
    """
    places = {
        place.name: place
        for place in linear_places(model)
        if not (in_adapter and place.is_bypassed)
    }
    names = _chosen_names(model, places, config)
    layers = []
    for name in names:
        module, weight, bias = places[name].module, places[name].weight, places[name].bias
        if not isinstance(weight, nn.Parameter):
            check_not_flattened(name, model)
            raise ValueError(
                f"Layer {name} computes its weight (a parametrization such as weight_norm), so "
                "there is no tensor to update. Put it into exclude_modules."
            )
        check_real_weight(name, weight)
        if not weight.requires_grad:
            continue
        check_whole_weight(name, weight, sides_of(module))
        if not weight.numel():
            continue
        trainable_bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None
        layers.append(
            LinearLayer(
                name, weight, trainable_bias, is_conv1d(module), *places[name].parameter_names
            )
        )
    if not layers:
        raise ValueError(
            f"No layer can be routed: the weights of all {len(names)} matching linear layers are "
            "frozen (requires_grad=False)."
        )
    weights = [(layer.name, layer.weight) for layer in layers]
    check_not_tied(model, weights, use="adapted" if in_adapter else "routed")
    if not config.freeze_rest:
        _check_own_biases(layers)
    return layers


def weights_of(layers: Iterable[LinearLayer]) -> list[nn.Parameter]:
    """Return the weights and biases of layers."""
    return [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]


def matching_linears(model: nn.Module, config: MoLFConfig) -> dict[str, nn.Module]:
    """Return the linear modules that `config` selects, trainable or not, by name.

    Raises:
        ValueError: No module is selected, or a pattern matches nothing.
    """
    linears = linear_modules(model)
    return {name: linears[name] for name in _chosen_names(model, linears, config)}


# By the use of the weights: the reason and the remedy.
_TIED = {
    "routed": (
        "its gradient sums both uses, so it cannot be routed",
        "Put it into exclude_modules",
    ),
    "adapted": (
        "an adapter would act on one use alone, and merging it would change both",
        "Put it into exclude_modules",
    ),
    "merged": ("merging its adapter would change both", "Put it into exclude_modules"),
    "assigned": ("merging its adapter would change both", "Make it full or frozen, like the other"),
}


def check_not_tied(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, use: str = "routed"
) -> None:
    """Refuse layers that share their weight with another module.

    A layer that the model has under two names passes if `use` is `"routed"`: all experts get the
    gradient of both. PEFT puts an adapter under one of the names.

    Raises:
        ValueError: For the first such layer, with the names of the others.
    """
    # By tensor, because frameworks tie by assigning the same parameter.
    uses = _uses(model, by_every_name=use != "routed")
    for name, weight in weights:
        others = [one for one in uses[weight] if one != name]
        if others:
            reason, change = _TIED[use]
            raise ValueError(
                f"Layer {name} shares its weight with {', '.join(others)}: {reason}. {change}."
            )


def _check_own_biases(layers: Iterable[LinearLayer]) -> None:
    """Refuse two routed layers with one bias.

    Raises:
        ValueError: For the first two.
    """
    owners: dict[torch.Tensor, str] = {}
    for layer in layers:
        if layer.bias is None:
            continue
        if layer.bias in owners:
            raise ValueError(
                f"Layer {layer.name} shares its bias with {owners[layer.bias]}: its gradient sums "
                "both uses, and only one layer can update it. Put one of them into exclude_modules."
            )
        owners[layer.bias] = layer.name


def head_name(model: nn.Module) -> str | None:
    """Return the name of a transformers model's output layer or task head; None without one."""
    # Within wrappers (DDP, compile, PEFT) the inner model has the method.
    for name, module in model.named_modules():
        inner = set(dict(module.named_children()))
        if callable(getattr(module, "get_output_embeddings", None)) and "base_model" not in inner:
            head = module.get_output_embeddings()
            if head is None:
                heads = (getattr(module, name, None) for name in TASK_HEADS)
                head = next((one for one in heads if isinstance(one, nn.Module)), None)
            found = [n for n, m in model.named_modules() if m is head]
            return cleaner(model)(found[0]) if head is not None and found else None
        # The model is at most two wrappers deep (DDP in a compiled module).
        if name.count(".") > 1:
            break
    return None


def _chosen_names(model: nn.Module, linears: Iterable[str], config: MoLFConfig) -> list[str]:
    """Return the names of linear layers that `config` selects."""
    linears = list(linears)
    if not linears:
        raise ValueError("No layer can be routed: the model has no nn.Linear and no Conv1D.")
    head, every = head_name(model), [place.name for place in linear_places(model)]
    default_exclude = MoLFConfig.exclude_modules
    if config.exclude_modules != default_exclude:
        check_patterns("exclude_modules", config.exclude_modules, every)
    if config.target_modules == "all-linear":
        targeted = [name for name in linears if not is_in_head(name, head)]
    else:
        check_patterns("target_modules", config.target_modules, linears)
        targeted = [name for name in linears if matches(name, config.target_modules)]
    names = [name for name in targeted if not matches(name, config.exclude_modules)]
    if not names:
        raise ValueError(
            f"No layer is routed: exclude_modules={_shown(config.exclude_modules)} leaves none of "
            f"{_shown(config.target_modules)}. Linear layers of the model: {_endings(linears)}."
        )
    return names


def is_in_head(name: str, head: str | None) -> bool:
    """Return whether a layer is the head or a part of it."""
    return head is not None and (name == head or name.startswith(f"{head}."))


def matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    """Match as PEFT does: a string is a regular expression, a tuple has name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def check_patterns(option: str, patterns: str | tuple[str, ...], linears: Iterable[str]) -> None:
    """Refuse a pattern that matches no linear layer.

    Raises:
        ValueError: For the first such pattern, with the existing name endings.
    """
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        single = patterns if isinstance(patterns, str) else (pattern,)
        if not any(matches(name, single) for name in linears):
            raise ValueError(
                f"Invalid {option}: {pattern!r} matches no linear layer. Linear layers of the "
                f"model end in: {_endings(linears)}."
            )


def _endings(linears: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _shown(patterns: str | tuple[str, ...]) -> str:
    return patterns if isinstance(patterns, str) else ",".join(patterns)


def _uses(model: nn.Module, *, by_every_name: bool) -> dict[torch.Tensor, list[str]]:
    """Return the places of each parameter; a tied one has several.

    A place is the name of the layer; for attributes other than `weight` and `bias`, with theirs.

    Args:
        model: The model.
        by_every_name: Whether a module that two modules hold, or one under two names, has a place
            for each. A module inside of such a module has one.
    """
    names = defaultdict(list)
    for parent, module in model.named_modules():
        for key, child in module._modules.items():
            if child is not None:
                names[child].append(".".join(filter(None, (parent, key))))
    places = defaultdict(list)
    clean = cleaner(model)
    for first, module in model.named_modules():
        for name in names.get(module, [first]) if by_every_name else [first]:
            layer = clean(name).removesuffix(".base_layer")
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    own = "" if key in ("weight", "bias") else re.sub("_(weight|bias)$", "", key)
                    places[parameter].append(".".join(filter(None, (layer, own))))
    return places


def warn_of_large_ranks(layers: Sequence[Any], rank: int, *, in_adapter: bool = False) -> None:
    """Warn of layers whose smaller side is below a rank.

    Args:
        layers: The layers; each has `name`, `in_features` and `out_features`.
        rank: Largest rank of an expert, or the rank of an adapter.
        in_adapter: Whether it is the rank of a plain adapter (no routing).
    """
    small = [layer for layer in layers if rank > min(layer.in_features, layer.out_features)]
    if small:
        sizes = [sum(x.in_features * x.out_features for x in some) for some in (small, layers)]
        share = sizes[0] / sizes[1]
        layer, factors = ("adapted", "the adapter") if in_adapter else ("routed", "a LoRA expert")
        warnings.warn(
            f"Rank {rank} exceeds the smaller side of {len(small)} of {len(layers)} {layer} layers "
            f"({share:.0%} of their weights; first: {small[0].name}): there {factors} is no longer "
            "low-rank.",
            stacklevel=3,
        )
