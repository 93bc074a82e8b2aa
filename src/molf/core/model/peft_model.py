"""PEFT adapters for the LoRA experts: configuration, and models with such an adapter."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from molf.core.config import MoLFConfig
from molf.core.model.adapted_layers import adapter_layers, trained_layers
from molf.core.model.factors import draw_lora_a
from molf.core.model.linear_layers import (
    TASK_HEADS,
    check_not_tied,
    head_name,
    is_in_head,
    matching_linears,
    trainable_layers,
)
from molf.core.model.linear_places import linear_places
from molf.core.model.module_names import cleaner
from molf.core.model.quantised import is_quantised, keep_differentiable
from molf.core.model.weight_checks import check_adaptable_weight, sides_of
from molf.core.model.wrappers import check_not_in_module
from molf.inputs import check_installed

_FOR_TOKENS = ("TOKEN_CLS", "QUESTION_ANS")  # PEFT would both adapt and train their heads


def peft_config(config: MoLFConfig, **options: Any) -> Any:
    """Return the `peft.LoraConfig` of one adapter for all LoRA experts of `config`.

    Its rank is the sum of the experts' ranks and its scaling 1, so the columns of B hold `s_i B_i`.
    PEFT draws A (seed the process before `get_peft_model`); `with_adapter` draws it from
    `config.seed`.

    Args:
        config: Settings of the method.
        **options: Further keywords of `LoraConfig` (`task_type`, `modules_to_save`, ...), except
            those that `config` sets. For a head other than a language model's give `task_type`, so
            that PEFT excludes the head.
    """
    check_installed("peft", "An adapter")
    from peft import LoraConfig

    targets: Any = config.target_modules
    is_default = config.exclude_modules == MoLFConfig.exclude_modules
    excluded: Any = config.exclude_modules
    if targets == "all-linear" and is_default:
        # PEFT excludes other heads itself, and warns of exclusions that match nothing.
        excluded = TASK_HEADS if options.get("task_type") in _FOR_TOKENS else ()
    chosen = {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": (excluded if isinstance(excluded, str) else list(excluded)) or None,
    }
    total = sum(config.ranks)
    return LoraConfig(
        r=total,
        lora_alpha=total,
        use_rslora=False,
        lora_dropout=config.lora_dropout,
        **{**chosen, **options},
    )


_FACTOR_PARTS = ("lora_", "modules_to_save", "token_adapter", "original_module")


def with_adapter(
    model: nn.Module, config: MoLFConfig | None = None, *, adapter_name: str = "default"
) -> Any:
    """Add an adapter for `config`'s LoRA experts to a model; set `requires_grad` as configured.

    A plain model is wrapped by `peft.get_peft_model`. A is drawn from (seed, layer name, expert) as
    in the folded form; B is zero. With `freeze_base=False` the base weights of the adapted layers
    are trained (explicit form). `freeze_rest` freezes all parameters that are not routed; otherwise
    their `requires_grad` stays. A model with a LoRA adapter keeps it; only `requires_grad` is set.

    Other trained parameters (base weights of the explicit form; norms and embeddings with
    `freeze_rest=False`) are saved in the adapter's file (`WholePeftModel`). A model that had an
    adapter saves the adapter alone, as PEFT does.

    Args:
        model: A plain model, or a PEFT LoRA model.
        config: Settings of the method; default `MoLFConfig()`.
        adapter_name: Name of the new adapter.

    Returns:
        A `peft.PeftModel`; its base model is `model`, changed in place.

    Raises:
        ValueError: The model is in an attribute `module`, as DDP has one (wrap the result);
            no layer can be adapted (`find_layers`); PEFT does not support one (the model is
            unchanged then); or the model's adapter does not fit (`find_adapted`).
    """
    config = MoLFConfig() if config is None else config
    is_new = not adapter_layers(model)
    if is_new:
        check_not_in_module(model)
    keep_differentiable(model)
    # PEFT freezes the base, and a failure must leave the model unchanged.
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    adapted, trainable = model, set(before)
    names = _names(model, config) if is_new else []
    try:
        if is_new:
            trainable = {parameter for parameter, was in before.items() if was}
            # PEFT draws A too; the process's generator must not change.
            with torch.random.fork_rng(devices=[]):
                adapted = add_adapter(
                    model, names, lambda **chosen: peft_config(config, **chosen), adapter_name
                )
        _set_trainable(adapted, trainable, config)
        if is_new and config.freeze_rest is None:
            _warn_of_frozen_head(adapted, trainable)
        layers = trained_layers(adapted, config)
    except ValueError:
        for parameter, was in before.items():
            parameter.requires_grad_(was)
        raise
    if is_new:
        with torch.no_grad():
            for layer in layers:
                drawn = draw_lora_a(config.seed, layer.name, config.ranks, layer.in_features)
                layer.A[1].copy_(drawn)
        from molf.core.model.peft_saving import save_whole

        save_whole(adapted)
    return adapted


def _warn_of_frozen_head(model: nn.Module, trainable: set[nn.Parameter]) -> None:
    """Warn of a frozen task head, which is often newly initialised."""
    head, clean = head_name(model), cleaner(model)
    if head is None or head.rpartition(".")[2] not in TASK_HEADS:
        return
    if any(
        parameter in trainable and not parameter.requires_grad and is_in_head(clean(name), head)
        for name, parameter in model.named_parameters()
    ):
        warnings.warn(
            f"The head {head} is no part of the adapter, and freeze_base=True freezes it. Set "
            "freeze_rest=False to train it with plain AdamW, or freeze_rest=True to freeze it "
            "without this warning.",
            stacklevel=3,
        )


def _names(model: nn.Module, config: MoLFConfig) -> list[str]:
    """Return the names of the layers to adapt; with `freeze_base` also frozen ones."""
    if not config.freeze_base:
        return [layer.name for layer in trainable_layers(model, config, in_adapter=True)]
    linears = matching_linears(model, config)
    weights = [(n, m, m.weight) for n, m in linears.items() if isinstance(m.weight, torch.Tensor)]
    for name, module, weight in weights:
        check_adaptable_weight(name, weight, sides_of(module))
    check_not_tied(model, [(name, weight) for name, _, weight in weights], use="adapted")
    return list(linears)


def add_adapter(
    model: nn.Module,
    names: list[str],
    make_config: Callable[..., Any],
    adapter_name: str,
    *,
    remedy: str = "put unsupported ones into exclude_modules",
) -> Any:
    """Wrap a model by PEFT with an adapter on these layers alone.

    Args:
        model: A plain model; changed in place.
        names: Names of the layers.
        make_config: Returns PEFT's configuration; called with the keywords that choose the layers.
        adapter_name: Name of the adapter.
        remedy: For the message of an error.

    Returns:
        The `peft.PeftModel`, whose base model is `model`.

    Raises:
        ValueError: PEFT does not support a layer, or `adapter_name` is not allowed; the model's
            layers are as before then.
    """
    check_installed("peft", "An adapter")
    _check_adapter_name(adapter_name)
    from peft import get_peft_model

    clean, chosen = cleaner(model), set(names)
    originals = [
        (*raw.rpartition(".")[::2], module)
        for raw, module in model.named_modules()
        if clean(raw) in chosen
    ]
    settings = make_config(
        target_modules=_targets(names, (place.name for place in linear_places(model))),
        exclude_modules=None,
        # With this task type PEFT uses its class with `generate`.
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    had_config = hasattr(model, "peft_config")
    try:
        return get_peft_model(model, settings, adapter_name=adapter_name)
    except (ValueError, TypeError, NotImplementedError) as error:
        for parent, attribute, module in originals:
            # PEFT may have wrapped some layers before it rejects one.
            setattr(model.get_submodule(parent), attribute, module)
        if not had_config and hasattr(model, "peft_config"):
            del model.peft_config
        kinds = dict.fromkeys(type(module).__name__ for _, _, module in originals)
        reason = " ".join(str(error).split())
        raise ValueError(
            f"PEFT cannot adapt the layers ({', '.join(kinds)}); {remedy}. PEFT's error: "
            f"{reason[:300]}"
        ) from error


def _check_adapter_name(name: Any) -> None:
    """Refuse a name that cannot be a key of PEFT's dictionaries of factors, or hides them.

    Raises:
        ValueError: It is such a name.
    """
    # The factors' parameters are called `lora_A.NAME.weight`, and the base's `base_layer.weight`.
    taken = isinstance(name, str) and (name == "base_layer" or hasattr(nn.ModuleDict(), name))
    if taken or not isinstance(name, str) or not name or "." in name:
        raise ValueError(
            f"Invalid adapter_name={name!r}. Must be text without dots, such as default, and no "
            "name that torch or PEFT uses (base_layer, keys)."
        )


def exactly(name: str, raw: str | None = None) -> str:
    """Return a key of PEFT's `rank_pattern` and `alpha_pattern` that matches this module alone.

    Args:
        name: Its name in the plain model, which loads the adapter later.
        raw: Its name in the model here, if wrappers such as `torch.compile` add prefixes.
    """
    names = {raw or name, name}
    found = "|".join(map(re.escape, sorted(names)))
    return f"^{found}" if len(names) == 1 else f"^(?:{found})"


def _targets(names: list[str], linears: Iterable[str]) -> list[str] | str:
    """Return PEFT's `target_modules` for these modules alone: names, or a regular expression."""
    chosen = set(names)
    ends = (other.split(".")[1:] for other in set(linears) - chosen)
    if any(".".join(end[start:]) in chosen for end in ends for start in range(len(end))):
        return "|".join(map(re.escape, names))
    return names


def _set_trainable(model: nn.Module, rest: set[nn.Parameter], config: MoLFConfig) -> None:
    """Set `requires_grad` of the base; PEFT sets that of the adapters.

    Args:
        model: A PEFT LoRA model.
        rest: Parameters outside the routed layers that are trained unless `config` freezes them.
        config: Settings of the method.
    """
    tuners = adapter_layers(model).values()
    weights = {p for t in tuners for n, p in t.named_parameters() if n == "base_layer.weight"}
    for name, parameter in model.named_parameters():
        if any(part.startswith(_FACTOR_PARTS) for part in name.split(".")):
            continue
        trained = not config.freeze_base if parameter in weights else parameter in rest
        if parameter not in weights and config.freezes_rest:
            trained = False
        parameter.requires_grad_(trained and not is_quantised(parameter))
