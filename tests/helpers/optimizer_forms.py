"""Every form in which an optimizer of ours trains a model, and every storage, by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

import molf
from core_helpers import tiny_model
from molf import AdamW, MoLFAdamW, MoLFConfig

FORMS = ["folded", "folded-top2", "explicit", "frozen", "fft"]
ADAPTERS = ["explicit", "frozen"]


class Storage(NamedTuple):
    """How weights and moments are kept: a dtype, keywords of the optimizer.

    Attributes:
        dtype: Of the model.
        options: Keywords of the optimizer.
        casts_adapter: Whether the factors of an adapter get the dtype too; PEFT makes them float32
            above a bfloat16 base.
    """

    dtype: torch.dtype
    options: Mapping[str, Any] = MappingProxyType({})
    casts_adapter: bool = True


BF16 = torch.bfloat16
STORAGES = {
    "float32": Storage(torch.float32),
    "float64": Storage(torch.float64),
    "exact": Storage(BF16, casts_adapter=False),
    "stochastic": Storage(BF16, {"weight_rounding": "stochastic"}),
    "nearest": Storage(BF16, {"weight_rounding": "nearest"}),
    "8bit": Storage(BF16, {"state_dtype": "8bit"}),
    "float32 8bit": Storage(torch.float32, {"state_dtype": "8bit"}),
    "stochastic 8bit": Storage(BF16, {"weight_rounding": "stochastic", "state_dtype": "8bit"}),
}


def build(
    form: str,
    storage: str = "float32",
    *,
    model: Callable[[], nn.Module] = tiny_model,
    **options: Any,
) -> tuple[nn.Module, AdamW]:
    """A model in a storage's dtype and its optimizer, the same at every call.

    Args:
        form: One of `FORMS`.
        storage: One of `STORAGES`.
        model: Makes any module with linear layers.
        **options: Fields of `MoLFConfig`, and keywords of the optimizer.
    """
    dtype, how, casts_adapter = STORAGES[storage]
    torch.manual_seed(0)
    made = model().to(dtype)
    options = {"lr": 1e-2, **how, **options}
    return in_form(form, made, adapter_dtype=dtype if casts_adapter else None, **options)


def in_form(
    form: str, model: nn.Module, *, adapter_dtype: torch.dtype | None = None, **options: Any
) -> tuple[nn.Module, AdamW]:
    """The model, with an adapter where the form has one, and its optimizer.

    Args:
        form: One of `FORMS`.
        model: It keeps its dtype.
        adapter_dtype: Of the adapter's factors; None is PEFT's choice.
        **options: Fields of `MoLFConfig` (`"fft"` ignores them), and keywords of the optimizer.
    """
    fields = MoLFConfig.__dataclass_fields__
    chosen = {name: options.pop(name) for name in list(options) if name in fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "fft":
            options.pop("lora_lr", None)
            return model, AdamW(model.named_parameters(), **options)
        settings = {"ranks": (2, 3), "alpha": 4.0, "top_k": 2 if form == "folded-top2" else 1}
        if form in ADAPTERS:
            settings |= {"freeze_base": form == "frozen", "freeze_rest": False}
        config = MoLFConfig(**{**settings, **chosen})
        if form in ADAPTERS:
            model = molf.with_adapter(model, config)
            if adapter_dtype is not None:
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.data = parameter.data.to(adapter_dtype)
        return model, MoLFAdamW.from_model(model, config, **{"lora_lr": 3e-2, **options})
