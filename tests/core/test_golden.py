"""Traces of the paper's reference implementation, replayed in float64 (see golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import molf
from molf import MoLFAdamW, MoLFConfig

GOLDEN = Path(__file__).parent / "golden"
TRACES = ["molf_epd_top1", "molf_epd_top2", "molf_pfn_two_experts"]


def tensor(arrays: dict[str, np.ndarray], key: str) -> torch.Tensor:
    return torch.from_numpy(arrays[key])


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("trace", TRACES)
def test_optimizer_follows_the_reference(trace, transposed):
    setup = json.loads((GOLDEN / f"{trace}.json").read_text())
    with np.load(GOLDEN / f"{trace}.npz") as file:
        arrays = dict(file)
    config = MoLFConfig(
        ranks=setup["ranks"],
        alpha=setup["alphas"],
        use_rslora=setup["use_rslora"],
        score=setup["score"],
        top_k=setup["top_k"],
    )
    experts = range(len(config.ranks))
    model, starts = nn.ModuleDict(), {}
    for name, sizes in setup["layers"].items():
        starts[name] = [
            (tensor(arrays, f"{name}/A0.{k}"), tensor(arrays, f"{name}/B0.{k}")) for k in experts
        ]
        model[name] = golden_layer(sizes, transposed)
        with torch.no_grad():
            weight = tensor(arrays, f"{name}/W0").clone()
            for scaling, (A, B) in zip(config.scalings, starts[name], strict=True):
                weight += scaling * B @ A
            model[name].weight.copy_(weight.t() if transposed else weight)
            if sizes["bias"]:
                model[name].bias.copy_(tensor(arrays, f"{name}/bias0"))

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
    for name, factors in starts.items():
        optimizer.set_lora_factors(name, factors)
    scheduler = LambdaLR(optimizer, lambda step: setup["lr_multipliers"][step])

    for step in range(setup["steps"]):
        for name, layer in model.items():
            grad = tensor(arrays, f"{name}/G")[step]
            layer.weight.grad = grad.t().contiguous() if transposed else grad.clone()
            if layer.bias is not None:
                layer.bias.grad = tensor(arrays, f"{name}/gbias")[step].clone()
        optimizer.step()
        scheduler.step()
        for name, layer in model.items():
            decision = optimizer.routing[name]
            assert list(decision.winners) == setup["routing"][step][name], (step, name)
            # The reference sums its scores in float32.
            assert decision.scores == pytest.approx(setup["scores"][step][name], rel=1e-4)
            weight = layer.weight.detach().t() if transposed else layer.weight.detach()
            merged = tensor(arrays, f"{name}/merged")[step]
            torch.testing.assert_close(weight, merged, rtol=0, atol=1e-9)

    for name, layer in model.items():
        factors = optimizer.lora_factors(name)
        base = layer.weight.detach().t() if transposed else layer.weight.detach()
        for k, (scaling, (A, B)) in enumerate(zip(config.scalings, factors, strict=True)):
            expected_A = tensor(arrays, f"{name}/A_final.{k}")
            expected_B = tensor(arrays, f"{name}/B_final.{k}")
            torch.testing.assert_close(A, expected_A, rtol=0, atol=1e-9)
            torch.testing.assert_close(B, expected_B, rtol=0, atol=1e-9)
            base = base - scaling * B @ A
        expected = tensor(arrays, f"{name}/W_final")
        torch.testing.assert_close(base, expected, rtol=0, atol=1e-9)
        if layer.bias is not None:
            expected = tensor(arrays, f"{name}/bias_final")
            torch.testing.assert_close(layer.bias.detach(), expected, rtol=0, atol=1e-9)


def golden_layer(sizes: dict[str, int], transposed: bool) -> nn.Module:
    """Return a linear layer; transformers' transposed one always has a bias."""
    if not transposed:
        bias = bool(sizes["bias"])
        return nn.Linear(sizes["in_features"], sizes["out_features"], bias=bias).double()
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(sizes["out_features"], sizes["in_features"]).double()
    if not sizes["bias"]:
        layer.bias = None
    return layer


@pytest.mark.parametrize("form", ["folded", "explicit"])
def test_whole_model_follows_the_reference(form):
    from transformers import AutoModelForCausalLM

    folder = GOLDEN / "e2e_qwen2"
    setup = json.loads((folder / "trace.json").read_text())
    arrays = load_file(folder / "trace.safetensors")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float64, attn_implementation="eager"
    )
    model.train()
    config = MoLFConfig(
        ranks=(setup["rank"],),
        alpha=setup["alpha"],
        use_rslora=setup["use_rslora"],
        score=setup["score"],
        top_k=setup["top_k"],
    )
    if form == "explicit":
        model = molf.with_adapter(model, config)
    optimizer = MoLFAdamW.from_model(
        model,
        config,
        lr=setup["lr"],
        lora_lr=setup["lora_lr"],
        weight_decay=setup["weight_decay"],
        lora_weight_decay=setup["lora_weight_decay"],
    )
    for key, A in arrays.items():
        if key.startswith("A0/"):
            layer = key.removeprefix("A0/")
            ((_, B),) = optimizer.lora_factors(layer)
            optimizer.set_lora_factors(layer, [(A, torch.zeros_like(B))])
    multipliers = [*setup["lr_multipliers"], 0.0]
    scheduler = LambdaLR(optimizer, lambda step: multipliers[step])

    for step, ids in enumerate(arrays["input_ids"]):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert loss.item() == pytest.approx(setup["losses"][step], abs=1e-5), step
        winners = {name: decision.winners[0] for name, decision in optimizer.routing.items()}
        assert winners == setup["routing"][step], step

    final = {k.removeprefix("final/"): v for k, v in arrays.items() if k.startswith("final/")}
    weights = dict(molf.merge(model).named_parameters())
    assert weights.keys() == final.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.detach().float(), final[name], rtol=0, atol=1e-5)
