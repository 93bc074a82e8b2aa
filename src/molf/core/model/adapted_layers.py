"""The routed layers of a PEFT model: all layers with the trained adapter.

PEFT's layers are recognised by their attributes; peft is not imported.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from molf.core.config import MoLFConfig
from molf.core.model.linear_layers import (
    check_not_tied,
    check_patterns,
    head_name,
    is_in_head,
    matches,
    warn_of_large_ranks,
)
from molf.core.model.linear_places import is_linear
from molf.core.model.module_names import cleaner
from molf.core.model.quantised import is_repacked
from molf.core.model.weight_checks import check_real_weight, check_whole_weight, sides_of


@dataclass(frozen=True)
class AdaptedLayer:
    """A routed layer of a PEFT model.

    Attributes:
        name: Name in the plain model, without prefixes of PEFT or of wrappers.
        A: First factor, [R, in], after its name in the PEFT model.
        B: Second factor, [out, R], after its name.
        scaling: s, by which PEFT multiplies the adapter's output.
        weight: Weight of the base layer; None with a frozen base.
        bias: Bias of the base layer; None if missing or frozen.
    """

    name: str
    A: tuple[str, nn.Parameter]
    B: tuple[str, nn.Parameter]
    scaling: float
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    @property
    def weight_name(self) -> str:
        """Name of the base weight in the plain model."""
        return f"{self.name}.weight"

    @property
    def bias_name(self) -> str:
        """Name of the base bias in the plain model."""
        return f"{self.name}.bias"

    @property
    def in_features(self) -> int:
        """Size of the layer's input."""
        return self.A[1].shape[1]

    @property
    def out_features(self) -> int:
        """Size of the layer's output."""
        return self.B[1].shape[0]


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the PEFT layers of a model, of any method that wraps layers, by raw name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
        and hasattr(module, "adapter_layer_names")
        and not hasattr(module, "trainable_tokens_delta")  # replaces rows of an embedding
    }


def find_adapted(model: nn.Module, config: MoLFConfig) -> list[AdaptedLayer]:
    """Return the layers of a PEFT model with its trained adapter, in the model's order.

    The trained adapter is active and not frozen. Every layer with it is routed, so the patterns of
    `config` must select all of them.

    Raises:
        ValueError: There is no such adapter or more than one; it is not plain LoRA, or on layers
            that are not linear; its rank is not the sum of `config.ranks`; or, with
            `freeze_base=False`, a base weight is quantised, frozen or tied.

    Warns:
        UserWarning: As `find_layers`; and if dropout of adapter and `config` differ.
    """
    layers = trained_layers(model, config)
    _warn_of_dropout(adapter_layers(model), config)
    warn_of_large_ranks(layers, max(config.ranks))
    return layers


def trained_layers(model: nn.Module, config: MoLFConfig) -> list[AdaptedLayer]:
    """Return the layers as `find_adapted` does, without warnings."""
    clean = cleaner(model)
    tuners = adapter_layers(model)
    for name, module in tuners.items():
        # AdaLoRA has a lora_A too, which holds parameters instead of layers.
        if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            raise ValueError(
                f"Layer {clean(name)} carries an adapter that is not LoRA ({_kind(module)}): "
                "experts are slices of a LoRA adapter. Merge or remove it, or adapt the plain "
                "model with molf.with_adapter."
            )
    adapter = trained_adapter(tuners)
    layers = []
    for name, module in tuners.items():
        if any(adapter in getattr(module, part) for part in ("lora_A", "lora_embedding_A")):
            _check_plain(clean(name), module, adapter)
            layers.append(_adapted_layer(name, clean(name), module, adapter, config))
    _check_selected([layer.name for layer in layers], head_name(model), config)
    if not config.freeze_base:
        weights = [(x.name, x.weight) for x in layers if x.weight is not None]
        check_not_tied(model, weights, use="adapted")
    return layers


def trained_adapter(tuners: dict[str, Any]) -> str:
    """Return the name of the one LoRA adapter that is active and has a trainable factor.

    Raises:
        ValueError: There is none, or there are several.
    """
    states: dict[str, str] = {}
    for module in tuners.values():
        if not hasattr(module, "lora_A"):
            continue
        for adapter in (*module.lora_A, *module.lora_embedding_A):
            if adapter not in module.active_adapters:
                state = "inactive"
            elif module.disable_adapters:
                state = "disabled"
            elif not any(p.requires_grad for p in _factors(module, adapter)):
                state = "frozen"
            else:
                state = "trained"
            # An adapter counts as trained if one of its layers is.
            if states.get(adapter) != "trained":
                states[adapter] = state
    trained = [adapter for adapter, state in states.items() if state == "trained"]
    if not trained:
        found = ", ".join(f"{adapter!r} is {state}" for adapter, state in states.items())
        raise ValueError(
            f"No LoRA adapter of the model can be trained: {found}. Activate one with "
            "model.set_adapter(name), or load it with is_trainable=True."
        )
    if len(trained) > 1:
        raise ValueError(
            f"Adapters {', '.join(map(repr, trained))} are active and trainable at once; one can "
            f"hold the experts. Choose it with model.set_adapter({trained[0]!r})."
        )
    return trained[0]


def _kind(module: nn.Module) -> str:
    """Return a PEFT layer's method and class, such as "ia3.Linear"."""
    return f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"


def _factors(module: Any, adapter: str) -> list[nn.Parameter]:
    """Return the factors of a LoRA layer, also of embeddings."""
    if adapter in module.lora_embedding_A:
        return [module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]]
    return [module.lora_A[adapter].weight, module.lora_B[adapter].weight]


def _check_plain(name: str, module: Any, adapter: str) -> None:
    """Refuse layers whose output is not `W x + s B (A x)` of a linear layer."""
    own = f"Layer {name}: adapter {adapter!r}"
    if adapter in getattr(module, "lora_variant", {}) or module.use_dora.get(adapter):
        variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
        variant = "DoRA" if module.use_dora.get(adapter) else variant.removesuffix("Variant")
        raise ValueError(
            f"{own} is {variant}, which is not a sum of experts. Use a plain LoraConfig, such as "
            "molf.peft_config(config)."
        )
    if type(module).__name__ == "ParamWrapper":
        raise ValueError(
            f"{own} adapts the parameter {module.parameter_name!r} of a "
            f"{type(module.get_base_layer()).__name__} (target_parameters); only linear layers can "
            "be routed. Use the LoraConfig's target_modules."
        )
    if not (adapter in module.lora_A and isinstance(module.lora_A[adapter], nn.Linear)):
        base = type(module.get_base_layer()).__name__
        raise ValueError(
            f"{own} adapts a {base}; only linear layers can be routed. Leave it out of the "
            "LoraConfig's target_modules."
        )
    if module.merged_adapters:
        raise ValueError(
            f"Layer {name}: adapter {module.merged_adapters[0]!r} is merged into the base. Call "
            "model.unmerge_adapter() first."
        )
    if adapter not in module.active_adapters:
        raise ValueError(f"{own} is inactive there. Call model.set_adapter({adapter!r}).")
    for factor in ("lora_A", "lora_B"):
        if not getattr(module, factor)[adapter].weight.requires_grad:
            raise ValueError(f"{own}: {factor} is frozen. Both factors must be trainable.")


def _adapted_layer(
    raw: str, name: str, module: Any, adapter: str, config: MoLFConfig
) -> AdaptedLayer:
    lora_A, lora_B = _factors(module, adapter)
    for part in ("lora_A", "lora_B"):
        factor = getattr(module, part)[adapter]
        # DeepSpeed and FSDP shard the factors as well.
        check_whole_weight(f"{name}.{part}", factor.weight, sides_of(factor))
    total = sum(config.ranks)
    if lora_A.shape[0] != total:
        raise ValueError(
            f"Layer {name}: adapter {adapter!r} has rank {lora_A.shape[0]}, but "
            f"ranks={list(config.ranks)} need {total}, their sum. Use molf.peft_config(config), or "
            f"r={total} without a rank_pattern."
        )
    base = module.get_base_layer()
    if is_repacked(getattr(base, "weight", None)):
        raise ValueError(
            f"Layer {name}: since a forward pass in eval mode, bitsandbytes keeps its weight in "
            "the layout of inference on a CPU, which has no gradient. Load the model again."
        )
    scaling = float(module.scaling[adapter])
    # The step divides by it.
    if not math.isfinite(scaling) or scaling <= 0:
        raise ValueError(
            f"Layer {name}: adapter {adapter!r} has scaling {scaling}. Must be positive and finite."
        )
    bias = getattr(base, "bias", None)
    is_trained = isinstance(bias, nn.Parameter) and bias.requires_grad
    is_trained = is_trained and not (config.freeze_base or config.freezes_rest)
    return AdaptedLayer(
        name,
        (f"{raw}.lora_A.{adapter}.weight", lora_A),
        (f"{raw}.lora_B.{adapter}.weight", lora_B),
        scaling,
        None if config.freeze_base else _trainable_weight(name, base),
        bias if is_trained else None,
    )


def _trainable_weight(name: str, base: nn.Module) -> nn.Parameter:
    """Return the weight of a base layer for the `full` expert.

    Raises:
        ValueError: It is missing, quantised or frozen.
    """
    weight = getattr(base, "weight", None)
    if not is_linear(base) or not isinstance(weight, nn.Parameter):
        raise ValueError(
            f"Layer {name} has no weight that a full expert could train ({type(base).__name__}). "
            "Use freeze_base=True (MoLF-Efficient), or leave it out of the adapter."
        )
    check_real_weight(name, weight)
    check_whole_weight(name, weight, sides_of(base))
    if not weight.requires_grad:
        raise ValueError(
            f"Layer {name}: the base weight is frozen, and with freeze_base=False the full expert "
            "trains it. Call molf.with_adapter(model, config) first, or use freeze_base=True "
            "(MoLF-Efficient)."
        )
    return weight


def _check_selected(names: list[str], head: str | None, config: MoLFConfig) -> None:
    """Refuse patterns of the configuration that do not select all adapted layers."""
    adapted = dict.fromkeys(names, nn.Module())
    if config.target_modules != "all-linear":
        check_patterns("target_modules", config.target_modules, adapted)
    for name in names:
        targeted = config.target_modules == "all-linear" or matches(name, config.target_modules)
        if not targeted or matches(name, config.exclude_modules):
            option = "exclude_modules" if targeted else "target_modules"
            raise ValueError(
                f"Layer {name} carries the trained adapter, but {option}="
                f"{getattr(config, option)!r} leaves it out. Every adapted layer is routed: make "
                "the adapter and the configuration agree."
            )
        if config.target_modules == "all-linear" and is_in_head(name, head):
            raise ValueError(
                f"Layer {name} is the model's head and carries the trained adapter, but "
                "target_modules='all-linear' leaves heads out. Give molf.peft_config the "
                "task_type, or name the layers in target_modules."
            )


def _warn_of_dropout(tuners: dict[str, Any], config: MoLFConfig) -> None:
    adapter = trained_adapter(tuners)
    rates = {
        float(getattr(module.lora_dropout[adapter], "p", 0.0))
        for module in tuners.values()
        if adapter in module.lora_dropout
    }
    if config.lora_dropout and rates != {config.lora_dropout}:
        warnings.warn(
            f"lora_dropout={config.lora_dropout} of the configuration is not that of adapter "
            f"{adapter!r} ({', '.join(map(str, sorted(rates)))}): the adapter's is used.",
            stacklevel=3,
        )
