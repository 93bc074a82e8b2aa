"""The bias of `LoraConfig(lora_bias=True)` is trained with its adapter, by plain AdamW steps."""

from __future__ import annotations

import peft
import pytest
import torch

import molf
from molf import MoLFAdamW, MoLFConfig
from peft_helpers import IDS, tiny_qwen2

BIAS = "model.layers.0.self_attn.q_proj.lora_B.default.bias"


def adapted():
    settings = peft.LoraConfig(r=5, target_modules=["q_proj", "k_proj"], lora_bias=True)
    return peft.get_peft_model(tiny_qwen2(), settings)


def config(**options) -> MoLFConfig:
    return MoLFConfig(ranks=(2, 3), **{"freeze_base": True, **options})


@pytest.mark.parametrize("options", [{}, {"freeze_rest": False}, {"freeze_base": False}])
def test_it_moves_and_does_not_decay(options, recwarn):
    model = adapted()
    model = molf.with_adapter(model, config(**options))
    optimizer = MoLFAdamW.from_model(model, config(**options), lr=1e-2)
    (group,) = [g for g in optimizer.param_groups if BIAS in g["param_names"]]
    assert group["layer"] is None
    assert group["weight_decay"] == 0
    assert not [one for one in recwarn if "freezes" in str(one.message)]
    bias = group["params"][group["param_names"].index(BIAS)]
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradient = bias.grad.clone()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), -1e-2 * gradient.sign(), atol=1e-4, rtol=1e-2)


def test_freeze_rest_freezes_it():
    model = adapted()
    optimizer = MoLFAdamW.from_model(model, config(freeze_rest=True))
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert BIAS not in names
    frozen = [p for name, p in model.named_parameters() if name.endswith("lora_B.default.bias")]
    assert len(frozen) == 2
    assert not any(p.requires_grad for p in frozen)


def test_that_of_another_adapter_stays():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True))
    optimizer = MoLFAdamW.from_model(model, config())
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert BIAS in names
    assert not any("other" in name for name in names)


def test_it_is_merged():
    model = adapted()
    optimizer = MoLFAdamW.from_model(model, config(), lr=1e-1)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        after = molf.merge(model)(input_ids=IDS).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
