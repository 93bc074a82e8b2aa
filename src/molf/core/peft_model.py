"""Ordinary PEFT adapters that hold the LoRA experts: their configuration, and models with one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from molf.core.adapted import adapter_layers, trained_layers
from molf.core.config import MoLFConfig
from molf.core.factors import draw_lora_a
from molf.core.layers import (
    TASK_HEADS,
    check_not_tied,
    head_name,
    is_in_head,
    matching_linears,
    trainable_layers,
)
from molf.core.module_names import cleaner
from molf.core.places import linear_places
from molf.core.quantised import is_quantised, keep_differentiable
from molf.core.weights import check_adaptable_weight, sides_of

_FOR_TOKENS = ("TOKEN_CLS", "QUESTION_ANS")  # whose heads PEFT would both adapt and train


def peft_config(config: MoLFConfig, **options: Any) -> Any:
    """Return the `peft.LoraConfig` of one adapter that holds all LoRA experts of `config`.

    Its rank is the sum of the experts' ranks and its scaling 1, so the columns of B hold `s_i B_i`.
    PEFT draws A itself (seed the process before `get_peft_model`); `with_adapter` draws it from
    `config.seed`.

    Args:
        config: The method's settings.
        **options: Further keywords of `LoraConfig` (`task_type`, `modules_to_save`, ...); not those
            that `config` decides. A model with another head than a language model's needs its
            `task_type`, so that PEFT leaves the head out.
    """
    from peft import LoraConfig

    targets: Any = config.target_modules
    is_default = config.exclude_modules == MoLFConfig.exclude_modules
    excluded: Any = config.exclude_modules
    if targets == "all-linear" and is_default:
        # PEFT leaves out other heads by itself, and warns of exclusions that exclude nothing.
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
    """Give a model the adapter that holds `config`'s LoRA experts, and freeze what `config` says.

    A plain model is wrapped by `peft.get_peft_model`; A starts as in the folded form, a function of
    (seed, layer name, expert), B at zero. With `freeze_base=False` the base weights of the adapted
    layers stay trainable (the explicit form). Of what is not routed, `freeze_rest` freezes all, and
    otherwise each parameter stays as trainable as it was. A model that has a LoRA adapter already
    keeps it as it is: only what is trainable changes, and frozen parameters of the base are
    made trainable where `config` trains them.

    PEFT saves adapters alone. What is trained besides (the base of the explicit form, norms and
    embeddings with `freeze_rest=False`) is in `model.state_dict()` and in `molf.merge(model)`.

    Args:
        model: A plain model, or a PEFT LoRA model.
        config: What is routed and how; `MoLFConfig()` if not given.
        adapter_name: Name of the new adapter.

    Returns:
        A `peft.PeftModel`; the base model in it is `model`, changed in place.

    Raises:
        ValueError: No layer can be adapted (see `find_layers`), PEFT cannot adapt one (the model is
            then as it was), or an adapter of the model does not fit (see `find_adapted`).
    """
    config = MoLFConfig() if config is None else config
    keep_differentiable(model)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    is_new = not adapter_layers(model)
    if is_new:
        names = _names(model, config)
        trainable = {parameter for parameter, was in before.items() if was}
        adapted = _adapt(model, names, config, adapter_name)
    else:
        adapted, trainable = model, set(before)
    try:
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
    return adapted


def _warn_of_frozen_head(model: nn.Module, trainable: set[nn.Parameter]) -> None:
    """A task's head has often just been drawn; that of a language model never."""
    head, clean = head_name(model), cleaner(model)
    if head is None or head.rpartition(".")[2] not in TASK_HEADS:
        return
    if any(
        parameter in trainable and not parameter.requires_grad and is_in_head(clean(name), head)
        for name, parameter in model.named_parameters()
    ):
        warnings.warn(
            f"The head {head} is no part of the adapter, and freeze_base=True freezes it. "
            "freeze_rest=False trains it with plain AdamW steps; freeze_rest=True says that this "
            "is meant.",
            stacklevel=3,
        )


def _names(model: nn.Module, config: MoLFConfig) -> list[str]:
    """Names of the layers to adapt: what is routed; with freeze_base what was frozen, too."""
    if not config.freeze_base:
        return [layer.name for layer in trainable_layers(model, config, in_adapter=True)]
    linears = matching_linears(model, config)
    weights = [(n, m, m.weight) for n, m in linears.items() if isinstance(m.weight, torch.Tensor)]
    for name, module, weight in weights:
        check_adaptable_weight(name, weight, sides_of(module))
    check_not_tied(model, [(name, weight) for name, _, weight in weights])
    return list(linears)


def _adapt(model: nn.Module, names: list[str], config: MoLFConfig, adapter_name: str) -> Any:
    """Wrap the model by PEFT; if PEFT cannot, put its layers back and say why in one line."""
    from peft import get_peft_model

    clean = cleaner(model)
    originals = [
        (*raw.rpartition(".")[::2], module)
        for raw, module in model.named_modules()
        if clean(raw) in names
    ]
    settings = peft_config(
        config,
        target_modules=_exactly(names, (place.name for place in linear_places(model))),
        exclude_modules=None,
        # What makes PEFT's class for causal language models, which has `generate`.
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    had_config = hasattr(model, "peft_config")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(devices=[]):  # PEFT draws an A of its own
            return get_peft_model(model, settings, adapter_name=adapter_name)
    except (ValueError, TypeError, NotImplementedError) as error:
        for parent, attribute, module in originals:
            setattr(model.get_submodule(parent), attribute, module)
        for parameter, was in before.items():
            parameter.requires_grad_(was)
        if not had_config and hasattr(model, "peft_config"):
            del model.peft_config
        kinds = dict.fromkeys(type(module).__name__ for _, _, module in originals)
        reason = " ".join(str(error).split())
        raise ValueError(
            f"PEFT cannot adapt the layers ({', '.join(kinds)}); put those it does not know into "
            f"exclude_modules. PEFT says: {reason[:300]}"
        ) from error


def _exactly(names: list[str], linears: Iterable[str]) -> list[str] | str:
    """What PEFT matches with these modules and no other: names, else a regular expression."""
    others = set(linears) - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(map(re.escape, names))
    return names


def _set_trainable(model: nn.Module, rest: set[nn.Parameter], config: MoLFConfig) -> None:
    """Set `requires_grad` of the base as `config` says; the adapters' is PEFT's matter.

    Args:
        model: A PEFT LoRA model.
        rest: What outside the routed layers is trained unless `config` freezes it.
        config: The method's settings.
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
