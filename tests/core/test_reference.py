"""The reference optimizer (`molf.core.reference`) in a training loop, beside `MoLFAdamW`."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
import torch
from test_golden import GOLDEN, TRACES, golden_layer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import molf
from molf import MoLFAdamW, MoLFConfig
from molf.core.reference import ReferenceMoLFAdamW, new_slot

OPTIONS = {
    "lr": 3e-3,
    "lora_lr": (6e-3, 9e-3),
    "weight_decay": 0.1,
    "lora_weight_decay": 0.02,
    "betas": (0.9, 0.99),
}
CONFIG = {"ranks": (2, 3), "alpha": 4.0}


def tiny_qwen2(**changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **changes)).double()


def tiny_gpt2() -> nn.Module:
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, **none)
    return GPT2LMHeadModel(config).double()


def backward(model: nn.Module, step: int) -> None:
    ids = torch.randint(31, (3, 8), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def winners(optimizer) -> dict[str, tuple[str, ...]]:
    return {name: decision.winners for name, decision in optimizer.routing.items()}


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (tiny_qwen2, {}),
        (tiny_qwen2, {"score": "pfn", "top_k": 2}),
        (tiny_qwen2, {"score": "random"}),
        (tiny_qwen2, {"score": "lora"}),
        (tiny_gpt2, {"freeze_rest": True}),  # transposed weights, a tied head
        (tiny_gpt2, {"score": "full"}),
    ],
)
def test_reference_and_optimizer_train_a_model_to_the_same_weights(build, settings):
    model, config = build(), MoLFConfig(**CONFIG, **settings)
    other = copy.deepcopy(model)
    fast = MoLFAdamW.from_model(model, config, **OPTIONS)
    slow = ReferenceMoLFAdamW(other, config, **OPTIONS)
    schedules = [LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in (fast, slow)]
    taken = set()
    for step in range(8):
        for trained, optimizer in ((model, fast), (other, slow)):
            backward(trained, step)
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        assert winners(slow) == winners(fast)
        for name, decision in fast.routing.items():
            assert slow.routing[name].scores == pytest.approx(decision.scores, rel=1e-8)
            taken.update(decision.winners)
    assert len(fast.routing) == (14 if build is tiny_qwen2 else 8)
    assert len(taken) > 1 or settings.get("score") == "full"
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    for (name, one), (_, another) in pairs:
        assert one.requires_grad == another.requires_grad
        torch.testing.assert_close(one, another, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("trace", TRACES)
def test_reference_follows_the_traces_of_the_papers_implementation(trace):
    setup = json.loads((GOLDEN / f"{trace}.json").read_text())
    with np.load(GOLDEN / f"{trace}.npz") as file:
        arrays = {key: torch.from_numpy(value) for key, value in file.items()}
    names = ("ranks", "use_rslora", "score", "top_k")
    config = MoLFConfig(alpha=setup["alphas"], **{name: setup[name] for name in names})
    names = ("lr", "lora_lr", "weight_decay", "lora_weight_decay", "betas", "eps")
    model = nn.ModuleDict({n: golden_layer(sizes, False) for n, sizes in setup["layers"].items()})
    optimizer = ReferenceMoLFAdamW(model, config, **{name: setup[name] for name in names})
    for name, layer in model.items():
        optimizer.state[layer.weight] = {
            "W": new_slot(arrays[f"{name}/W0"]),
            "b": None if layer.bias is None else new_slot(arrays[f"{name}/bias0"]),
            "A": [new_slot(arrays[f"{name}/A0.{k}"]) for k in range(len(config.ranks))],
            "B": [new_slot(arrays[f"{name}/B0.{k}"]) for k in range(len(config.ranks))],
        }
    schedule = LambdaLR(optimizer, lambda step: setup["lr_multipliers"][step])
    for step in range(setup["steps"]):
        for name, layer in model.items():
            layer.weight.grad = arrays[f"{name}/G"][step]
            if layer.bias is not None:
                layer.bias.grad = arrays[f"{name}/gbias"][step]
        optimizer.step()
        schedule.step()
        for name, layer in model.items():
            assert list(optimizer.routing[name].winners) == setup["routing"][step][name]
            merged = arrays[f"{name}/merged"][step]
            torch.testing.assert_close(layer.weight.detach(), merged, rtol=0, atol=1e-9)


def test_frozen_base_takes_the_path_of_the_adapter():
    model, config = tiny_qwen2(), MoLFConfig(**CONFIG, freeze_base=True, freeze_rest=True)
    slow = ReferenceMoLFAdamW(other := copy.deepcopy(model), config, **OPTIONS)
    adapted = molf.with_adapter(model, config)
    fast = MoLFAdamW.from_model(adapted, config, **OPTIONS)
    for step in range(8):
        for trained, optimizer in ((adapted, fast), (other, slow)):
            backward(trained, step)
            optimizer.step()
        assert winners(slow) == winners(fast)
    merged = dict(molf.merge(adapted).named_parameters())
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter, merged[name], rtol=0, atol=1e-10, msg=name)


def test_closure_state_dict_and_refusals():
    model, config = tiny_qwen2(), MoLFConfig(**CONFIG)
    optimizer = ReferenceMoLFAdamW(model, config, **OPTIONS)
    loss = torch.tensor(1.0)
    assert optimizer.step(lambda: (backward(model, 0), loss)[1]) is loss
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_model = copy.deepcopy(model)
    resumed = ReferenceMoLFAdamW(resumed_model, config, **OPTIONS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for trained, each in ((model, optimizer), (resumed_model, resumed)):
        backward(trained, 1)
        each.step()
    for one, other in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(one, other)

    before = copy.deepcopy(model.state_dict())
    backward(model, 2)
    next(model.parameters()).grad.view(-1)[-1] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no dropout"):
        ReferenceMoLFAdamW(model, MoLFConfig(**CONFIG, lora_dropout=0.1))
    with pytest.raises(ValueError, match="float32 or float64"):
        ReferenceMoLFAdamW(model.bfloat16(), config)
