"""Every form in which an optimizer of ours trains a model, by name."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

import molf
from molf import AdamW, MoLFAdamW, MoLFConfig

FORMS = ["folded", "folded-top2", "explicit", "frozen", "fft"]


def in_form(form: str, model: nn.Module, **options: Any) -> tuple[nn.Module, AdamW]:
    """The model, with an adapter where the form has one, and its optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if form == "fft":
            return model, AdamW(model.named_parameters(), **options)
        config = MoLFConfig(ranks=(2, 3), alpha=4.0, top_k=2 if form == "folded-top2" else 1)
        if form in ("explicit", "frozen"):
            config = MoLFConfig(
                ranks=(2, 3), alpha=4.0, freeze_base=form == "frozen", freeze_rest=False
            )
            model = molf.with_adapter(model, config)
        return model, MoLFAdamW.from_model(model, config, lora_lr=3e-2, **options)
