"""Which linear layers of a model are routed."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from molf.core.config import MoLFConfig
from molf.core.quantised import is_quantised, kind_of

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
TASK_HEADS = ("score", "classifier", "qa_outputs")  # that PEFT trains as a whole by default


@dataclass(frozen=True)
class LinearLayer:
    """A routed linear layer of a model.

    Attributes:
        name: The module's name in the model, without the prefixes of wrappers (DDP, compile, FSDP).
        weight: [out, in], or [in, out] where `transposed`.
        bias: [out], or None if there is none or it is frozen.
        transposed: True for GPT-2's `Conv1D`, which stores its weight as [in, out].
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.weight.shape[0 if self.transposed else 1]


class HasSides(Protocol):
    """A layer whose two sides are known."""

    @property
    def name(self) -> str:
        """The layer's name."""

    @property
    def in_features(self) -> int:
        """Size of the input."""

    @property
    def out_features(self) -> int:
        """Size of the output."""


def clean_name(name: str, *, in_module: bool = True) -> str:
    """Return a module's or parameter's name without the prefixes that wrappers add.

    Args:
        name: The name.
        in_module: Whether a leading `module` is a wrapper's, see `is_in_module`.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if in_module and len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def is_in_module(model: nn.Module) -> bool:
    """Whether all of the model is in an attribute `module`, where DDP and DataParallel put it.

    Elsewhere `module` is the model's own name, and without it two layers could share one.
    """
    while len(children := dict(model.named_children())) == 1:
        name, model = next(iter(children.items()))
        if name == "module":
            return True
        if name not in _WRAPPERS:
            return False
    return False


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model, without wrappers, is a `PeftModel`."""
    inner = unwrapped(model)
    return hasattr(inner, "peft_config") and "base_model" in dict(inner.named_children())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that hold nothing else (DDP, compile, FSDP1)."""
    while len(children := dict(model.named_children())) == 1:
        name, child = next(iter(children.items()))
        if name not in ("module", *_WRAPPERS):
            break
        model = child
    return model


def cleaner(model: nn.Module) -> Callable[[str], str]:
    """Return what turns names of `model`'s modules and parameters into the plain model's own."""
    in_module, in_peft = is_in_module(model), is_peft_model(model)

    def clean(name: str) -> str:
        name = clean_name(name, in_module=in_module)
        if not in_peft:
            return name
        return name.removeprefix("base_model.model.").replace(".base_layer.", ".")

    return clean


def find_layers(model: nn.Module, config: MoLFConfig) -> list[LinearLayer]:
    """Return the linear layers of a plain `model` that `config` routes, in the model's order.

    Routed is every `nn.Linear` and every transformers `Conv1D` with a trainable weight whose name
    matches `config.target_modules` and not `config.exclude_modules`. With `"all-linear"` the head
    of a transformers model is left out as well: its output layer, or else its `score`, `classifier`
    or `qa_outputs`.

    Raises:
        ValueError: No layer is routed, a pattern matches nothing, a matching layer shares its
            weight with another module (a tied head), or is quantised or sharded.

    Warns:
        UserWarning: A rank exceeds a layer's smaller side, or linear weights exist that cannot be
            routed (fused mixture-of-experts tensors).
    """
    layers = trainable_layers(model, config)
    warn_of_large_ranks(layers, max(config.ranks))
    warn_of_fused_experts(model, trains_rest=not config.freezes_rest)
    return layers


def trainable_layers(model: nn.Module, config: MoLFConfig) -> list[LinearLayer]:
    """`find_layers` without its warnings."""
    linears = matching_linears(model, config)
    layers = []
    for name, module in linears.items():
        weight, bias = module.weight, module.bias
        if not isinstance(weight, nn.Parameter):
            raise ValueError(
                f"Layer {name} computes its weight (a parametrization such as weight_norm), so "
                "there is no tensor to update. Put it into exclude_modules."
            )
        check_real_weight(name, weight)
        if not weight.requires_grad:
            continue
        check_whole_weight(name, module)
        if not weight.numel():
            continue
        trainable_bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None
        layers.append(LinearLayer(name, weight, trainable_bias, _is_conv1d(module)))
    if not layers:
        raise ValueError(
            f"No layer can be routed: the weights of all {len(linears)} matching linear layers are "
            "frozen (requires_grad=False)."
        )
    check_not_tied(model, [(layer.name, layer.weight) for layer in layers])
    return layers


def matching_linears(model: nn.Module, config: MoLFConfig) -> dict[str, nn.Module]:
    """Return the linear modules whose names `config` selects, trainable or not, by name.

    Raises:
        ValueError: There are none, or a pattern matches nothing.
    """
    linears = linear_modules(model)
    if not linears:
        raise ValueError("No layer can be routed: the model has no nn.Linear and no Conv1D.")
    names = _matching_names(linears, config, head=head_name(model))
    return {name: linears[name] for name in names}


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every `nn.Linear` (quantised ones are) and `Conv1D` of a plain model, by clean name."""
    clean = cleaner(model)
    return {clean(name): module for name, module in model.named_modules() if is_linear(module)}


def check_real_weight(name: str, weight: torch.Tensor) -> None:
    """Refuse a quantised weight where a `full` expert is wanted.

    Raises:
        ValueError: With what to do instead.
    """
    if is_quantised(weight):
        raise ValueError(
            f"Layer {name} is quantised ({kind_of(weight)}): the full expert needs real weights. "
            "Use freeze_base=True with molf.with_adapter (MoLF-Efficient), load the model "
            "unquantised, or put the layer into exclude_modules."
        )


def check_whole_weight(name: str, module: nn.Module) -> None:
    """Refuse a linear layer of which this process holds a part only.

    Raises:
        ValueError: With what to do instead.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    sides: list[Any] = [getattr(module, side, None) for side in ("out_features", "in_features")]
    is_part = weight.dim() != 2 or (None not in sides and list(weight.shape) != sides)
    if is_part or hasattr(weight, "device_mesh"):
        raise ValueError(
            f"Layer {name} has a sharded weight, here of shape {tuple(weight.shape)} (DeepSpeed "
            "ZeRO-3, FSDP): a step needs whole weights. Train with DDP or one process."
        )


def check_not_tied(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, use: str = "routed"
) -> None:
    """Refuse layers that share their weight with another module, and so cannot be routed or merged.

    Raises:
        ValueError: The first of them, with what it is tied to.
    """
    owners = _weight_owners(model)
    for name, weight in weights:
        others = [owner for owner in owners[weight] if owner != name]
        if others:
            reason = "its gradient sums both uses, so it cannot be routed"
            if use == "merged":
                reason = "merging its adapter would change both"
            raise ValueError(
                f"Layer {name} shares its weight with {', '.join(others)}: {reason}. "
                "Put it into exclude_modules."
            )


def _is_conv1d(module: nn.Module) -> bool:
    # transformers' Conv1D, recognised by name: core imports torch alone.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not, as PEFT counts them."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def head_name(model: nn.Module) -> str | None:
    """Name of a transformers model's output layer or task head, never routed by default."""
    # Behind wrappers (DDP, compile, PEFT) the method is the inner model's.
    for name, module in model.named_modules():
        inner = set(dict(module.named_children()))
        if callable(getattr(module, "get_output_embeddings", None)) and "base_model" not in inner:
            head = module.get_output_embeddings()
            if head is None:
                heads = (getattr(module, name, None) for name in TASK_HEADS)
                head = next((one for one in heads if isinstance(one, nn.Module)), None)
            found = [n for n, m in model.named_modules() if m is head]
            return cleaner(model)(found[0]) if head is not None and found else None
        if name.count(".") > 1:
            break
    return None


def _matching_names(
    linears: dict[str, nn.Module], config: MoLFConfig, head: str | None
) -> list[str]:
    default_exclude = MoLFConfig.exclude_modules
    if config.exclude_modules != default_exclude:
        check_patterns("exclude_modules", config.exclude_modules, linears)
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
    """Whether a layer is the head, or a part of it."""
    return head is not None and (name == head or name.startswith(f"{head}."))


def matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    """Match as PEFT does: a string is a regular expression, a list holds name endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in patterns)


def check_patterns(
    option: str, patterns: str | tuple[str, ...], linears: dict[str, nn.Module]
) -> None:
    """Refuse a pattern that matches none of the linear layers.

    Raises:
        ValueError: The first such pattern, with the endings that there are.
    """
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        single = patterns if isinstance(patterns, str) else (pattern,)
        if not any(matches(name, single) for name in linears):
            raise ValueError(
                f"Invalid {option}: {pattern!r} matches no linear layer. Linear layers of the "
                f"model end in: {_endings(linears)}."
            )


def _endings(linears: dict[str, nn.Module]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _shown(patterns: str | tuple[str, ...]) -> str:
    return patterns if isinstance(patterns, str) else ",".join(patterns)


def _weight_owners(model: nn.Module) -> dict[torch.Tensor, list[str]]:
    """Names of the modules that hold each parameter; more than one means a tied weight."""
    owners = defaultdict(list)
    clean = cleaner(model)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter].append(clean(name).removesuffix(".base_layer"))
    return owners


def warn_of_large_ranks(layers: Sequence[HasSides], rank: int, *, in_adapter: bool = False) -> None:
    """Warn of layers for whose smaller side a rank is too large.

    Args:
        layers: The layers.
        rank: The largest of an expert, or that of an adapter.
        in_adapter: Whether it is the rank of one adapter, which nothing routes.
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


def warn_of_fused_experts(model: nn.Module, *, trains_rest: bool, in_adapter: bool = False) -> None:
    """Warn of 3-D weights, which hold many linear layers in one tensor and cannot be routed.

    Args:
        model: The model, with `requires_grad` as the user has set it.
        trains_rest: Whether what is not routed is trained.
        in_adapter: Whether one adapter is trained, which nothing routes.
    """
    fused = {
        parameter
        for module in model.modules()
        if not isinstance(module, _CONVOLUTIONS)
        for parameter in module._parameters.values()
        if parameter is not None and parameter.dim() == 3 and parameter.shape[0] > 1
    }
    if fused:
        own = (p for name, p in model.named_parameters() if ".lora_" not in name)
        share = sum(map(torch.numel, fused)) / sum(map(torch.numel, own))
        trained = sum(trains_rest and parameter.requires_grad for parameter in fused)
        if not trained:
            outcome = "they stay frozen"
        elif trained == len(fused):
            outcome = "they take plain AdamW steps"
        else:
            outcome = f"{trained} take plain AdamW steps, the others stay frozen"
        warnings.warn(
            f"{len(fused)} fused 3-D weights (mixture-of-experts; {share:.0%} of the parameters) "
            f"cannot be {'adapted' if in_adapter else 'routed'}: {outcome}.",
            stacklevel=3,
        )
