"""The reference's traces, replayed through ordinary PEFT adapters in float64."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from test_golden import GOLDEN, golden_layer, tensor
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import molf
from molf import MoLFAdamW, MoLFConfig

FROZEN = ["molfe_epd_top1"]
EXPLICIT = ["molf_epd_top1", "molf_epd_top2", "molf_pfn_two_experts"]
# What PEFT's own setting makes of the adapter's scaling s.
SCALINGS = {
    "scaling 1": {},
    "alpha / r": {"lora_alpha": 3, "use_rslora": False},
    "alpha / sqrt r": {"lora_alpha": 7, "use_rslora": True},
}


def scaled_config(config: MoLFConfig, options: dict, layers: list[str]) -> peft.LoraConfig:
    settings = molf.peft_config(config, target_modules=layers)
    for name, value in options.items():
        setattr(settings, name, value)
    return settings


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("trace", FROZEN + EXPLICIT)
def test_adapter_follows_the_reference(trace, transposed, scaling):
    setup = json.loads((GOLDEN / f"{trace}.json").read_text())
    with np.load(GOLDEN / f"{trace}.npz") as file:
        arrays = dict(file)
    frozen = trace in FROZEN
    config = MoLFConfig(
        ranks=setup["ranks"],
        alpha=setup["alphas"],
        use_rslora=setup["use_rslora"],
        score=setup["score"],
        top_k=setup["top_k"],
        freeze_base=frozen,
    )
    plain = nn.ModuleDict()
    for name, sizes in setup["layers"].items():
        plain[name] = golden_layer(sizes, transposed)
        weight = tensor(arrays, f"{name}/W0")
        with torch.no_grad():
            plain[name].weight.copy_(weight.t() if transposed else weight)
            if sizes["bias"]:
                plain[name].bias.copy_(tensor(arrays, f"{name}/bias0"))
    settings = scaled_config(config, SCALINGS[scaling], list(plain))
    model = molf.with_adapter(peft.get_peft_model(plain, settings), config)
    layers = {name: model.base_model.model[name] for name in setup["layers"]}
    s = {layer.scaling["default"] for layer in layers.values()}
    assert (s == {1.0}) == (scaling == "scaling 1")
    (s,) = s

    optimizer = MoLFAdamW.from_model(
        model,
        config,
        lr=setup["lr"],
        lora_lr=setup["lora_lr"],
        weight_decay=setup["weight_decay"],
        lora_weight_decay=setup["lora_weight_decay"],
        betas=tuple(setup["betas"]),
        eps=setup["eps"],
    )
    experts = range(len(config.ranks))
    for name in layers:
        factors = [
            (tensor(arrays, f"{name}/A0.{k}"), tensor(arrays, f"{name}/B0.{k}")) for k in experts
        ]
        optimizer.set_lora_factors(name, factors)
    scheduler = LambdaLR(optimizer, lambda step: setup["lr_multipliers"][step])
    close = {"rtol": 0, "atol": 1e-9}

    for step in range(setup["steps"]):
        for name, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            G = tensor(arrays, f"{name}/G")[step]
            A.grad, B.grad = s * B.detach().t() @ G, s * G @ A.detach().t()
            if not frozen:
                base = layer.base_layer
                base.weight.grad = G.t().contiguous() if transposed else G.clone()
                if base.bias is not None:
                    base.bias.grad = tensor(arrays, f"{name}/gbias")[step].clone()
        optimizer.step()
        scheduler.step()
        for name, layer in layers.items():
            decision = optimizer.routing[name]
            assert list(decision.winners) == setup["routing"][step][name], (step, name)
            # The reference sums its scores in float32.
            assert decision.scores == pytest.approx(setup["scores"][step][name], rel=1e-4)
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base = layer.base_layer.weight.t() if transposed else layer.base_layer.weight
            merged = (base + s * B @ A).detach()
            torch.testing.assert_close(merged, tensor(arrays, f"{name}/merged")[step], **close)

    for name, layer in layers.items():
        base = layer.base_layer
        weight = base.weight.detach().t() if transposed else base.weight.detach()
        torch.testing.assert_close(weight, tensor(arrays, f"{name}/W_final"), **close)
        if base.bias is not None:
            expected = tensor(arrays, f"{name}/bias_final")
            torch.testing.assert_close(base.bias.detach(), expected, **close)
        for k, (A, B) in enumerate(optimizer.lora_factors(name)):
            torch.testing.assert_close(A, tensor(arrays, f"{name}/A_final.{k}"), **close)
            torch.testing.assert_close(B, tensor(arrays, f"{name}/B_final.{k}"), **close)
