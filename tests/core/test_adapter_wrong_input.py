"""Adapters and bases that do not fit: one line each, and nothing is changed."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import molf
from core_helpers import Conv1D, tiny_model
from molf import MoLFAdamW, MoLFConfig
from peft_helpers import IDS, quantised_qwen2, spread, tiny_qwen2

E = MoLFConfig(ranks=(2, 3), freeze_base=True)
FULL = MoLFConfig(ranks=(2, 3))


def refused(model: nn.Module, config: MoLFConfig, match: str, call=MoLFAdamW.from_model) -> None:
    """The call raises one line, and the model is as it was."""
    names = [name for name, _ in model.named_modules()]
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with pytest.raises(ValueError, match=match) as raised:
        call(model, config)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert [name for name, _ in model.named_modules()] == names
    for (old, was), new in zip(before, model.parameters(), strict=True):
        assert old is new
        assert new.requires_grad is was


def lora(model: nn.Module | None = None, **options) -> nn.Module:
    settings = {"r": 5, "target_modules": ["q_proj", "up_proj"], **options}
    return peft.get_peft_model(model or tiny_qwen2(), peft.LoraConfig(**settings))


def test_rank_that_is_not_the_sum():
    message = r"q_proj: adapter 'default' has rank 8, but ranks=\[2, 3\] need 5, their sum"
    refused(lora(r=8), E, message)
    refused(lora(r=8), FULL, message, molf.with_adapter)
    refused(lora(rank_pattern={"up_proj": 4}), E, r"up_proj: adapter 'default' has rank 4")


def test_quantised_base_with_a_full_expert(tmp_path):
    for index, kind in enumerate(["bnb4", "bnb8", "torchao"]):
        base = quantised_qwen2(tiny_qwen2(), kind, tmp_path / str(index))
        why = r"q_proj is quantised .*full expert needs real weights.*freeze_base=True"
        refused(base, FULL, why, molf.with_adapter)
        refused(base, FULL, why)
        model = lora(base)
        refused(model, FULL, why)
        refused(model, FULL, why, molf.with_adapter)


def test_frozen_base_without_freeze_base():
    refused(lora(), FULL, r"base weight is frozen.*Call molf.with_adapter\(model, config\) first")
    partly = molf.with_adapter(tiny_qwen2(), FULL)
    down = partly.base_model.model.model.layers[0].mlp.down_proj
    down.base_layer.weight.requires_grad_(False)
    refused(partly, FULL, r"down_proj: the base weight is frozen")


def test_adapters_that_cannot_be_trained():
    model = lora()
    model.requires_grad_(False)
    refused(model, E, r"No LoRA adapter of the model can be trained: 'default' is frozen")
    model = lora()
    model.base_model.disable_adapter_layers()
    refused(model, E, r"'default' is disabled")
    model = lora()
    for tuner in (m for m in model.modules() if hasattr(m, "lora_A")):
        tuner._active_adapter = ["another"]
    refused(model, E, r"'default' is inactive\. Activate one with model.set_adapter\(name\)")
    model = lora()
    model.base_model.model.model.layers[0].mlp.up_proj.lora_A.requires_grad_(False)
    refused(model, E, r"up_proj: adapter 'default': lora_A is frozen")
    model = lora()
    model.merge_adapter()
    refused(model, E, r"adapter 'default' is merged into the base. Call model.unmerge_adapter\(\)")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (peft.LoraConfig(r=5, target_modules=["q_proj"], use_dora=True), r"is DoRA, which is not"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), r"not LoRA \(adalora\.SVDL"),
        (peft.LoraConfig(r=5, target_modules=[], target_parameters=["q_proj.weight"]),
         r"adapts the parameter 'weight' of a Linear \(target_parameters\)"),
        (peft.LoHaConfig(r=5, target_modules=["q_proj"]), r"is not LoRA \(loha.Linear\)"),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), r"\(ia3.Linear\)"),
        (peft.LoraConfig(r=5, target_modules=["q_proj", "embed_tokens"]),
         r"embed_tokens: adapter 'default' adapts a Embedding; only linear layers"),
        (peft.LoraConfig(r=5, target_modules=["lm_head"]), r"lm_head .* but exclude_modules="),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
         r"PEFT model without a LoRA layer \(PROMPT_TUNING\)"),
    ],
    ids=["dora", "adalora", "parameters", "loha", "ia3", "embedding", "head", "prompt"],
)  # fmt: skip
def test_other_adapters_in_the_way(settings, message):
    model = peft.get_peft_model(tiny_qwen2(tied=False), settings)
    refused(model, E, message)


def test_every_other_adapter_is_refused_by_its_kind():
    """Whatever PEFT has: the message says which it is, and what can be had instead."""
    kinds = [peft.LoKrConfig, peft.VeraConfig, peft.OFTConfig, peft.HRAConfig, peft.FourierFTConfig]
    for kind in kinds:
        model = peft.get_peft_model(tiny_qwen2(tied=False), kind(target_modules=["q_proj"]))
        name = kind.__name__.removesuffix("Config").lower()
        refused(model, E, rf"q_proj carries an adapter that is not LoRA \({name}\.")


def test_rank_stabilised_and_other_variants_that_are_plain_lora_pass():
    for options in ({"use_rslora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}):
        model = lora(**options)
        optimizer = MoLFAdamW.from_model(model, E, lr=1e-3)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        assert optimizer.routing


def test_patterns_that_disagree_with_the_adapter():
    def patterns(**options):
        return MoLFConfig(ranks=(2, 3), freeze_base=True, **options)

    refused(lora(), patterns(target_modules=["q_proj"]), r"up_proj .* target_modules=.* leaves it")
    refused(lora(), patterns(exclude_modules=["up_proj"]), r"up_proj .* exclude_modules=")
    refused(lora(), patterns(target_modules=["gate"]), r"'gate' matches no linear layer")
    MoLFAdamW.from_model(lora(), patterns(target_modules=["q_proj", "up_proj"]))


def test_layers_that_peft_cannot_adapt():
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": Conv1D(6, 6)})  # not transformers' Conv1D
    refused(model, E, r"PEFT cannot adapt .*Conv1D.*exclude_modules", molf.with_adapter)
    config = MoLFConfig(ranks=(2, 3), freeze_base=True, exclude_modules=["b"])
    MoLFAdamW.from_model(molf.with_adapter(model, config), config)
    assert not hasattr(tiny_model(), "peft_config")


@pytest.mark.parametrize("config", [E, FULL], ids=["frozen", "explicit"])
def test_what_the_folded_form_refuses_is_refused(config):
    refused(nn.ModuleDict({"n": nn.LayerNorm(3)}), config, r"no nn.Linear", molf.with_adapter)
    tied = tiny_qwen2(tied=True)
    options = {"ranks": (2, 3), "freeze_base": config.freeze_base}
    head = MoLFConfig(target_modules=["lm_head"], exclude_modules=(), **options)
    refused(tied, head, r"lm_head shares its weight with model.embed_tokens", molf.with_adapter)
    missing = MoLFConfig(target_modules=["gate"], **options)
    refused(tied, missing, r"'gate' matches no linear layer", molf.with_adapter)


class UsedTwice(nn.Module):
    """A layer under two names; PEFT replaces it under one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.c = self.b

    def forward(self, x):
        return self.c(self.b(self.a(x)).tanh())


@pytest.mark.parametrize("config", [E, FULL], ids=["frozen", "explicit"])
def test_a_layer_under_two_names_is_refused(config):
    """Merging would change the use without an adapter; the folded form trains both uses."""
    message = r"^Layer b shares its weight with c: an adapter would act on one use alone"
    refused(UsedTwice(), config, message, molf.with_adapter)
    settings = peft.LoraConfig(r=5, target_modules=["a", "b"])
    wrapped = peft.get_peft_model(UsedTwice(), settings)
    with pytest.raises(ValueError, match=r"^Layer b shares its weight with c: merging"):
        molf.merge(wrapped)
    wrapped.base_model.model.requires_grad_(True)
    if config is FULL:
        with pytest.raises(ValueError, match=message):
            molf.MoLFAdamW.from_model(wrapped, config)
    assignment = molf.Assignment.from_patterns(
        UsedTwice(), {"lora": {"r": 2, "modules": "b"}, "default": "full"}
    )
    with pytest.raises(ValueError, match=r"^Layer b shares its weight with c: merging"):
        molf.with_assignment(UsedTwice(), assignment)


def test_blocks_under_two_names_and_folded_layers_are_routed():
    model = UsedTwice()
    options = {"ranks": (2,), "exclude_modules": ()}
    optimizer = molf.MoLFAdamW.from_model(model, MoLFConfig(**options))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert set(optimizer.routing) == {"a", "b"}
    block = nn.Sequential(nn.Linear(4, 4))
    wrapped = molf.with_adapter(nn.Sequential(block, block), MoLFConfig(**options))
    x = torch.ones(1, 4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
        before = wrapped(x)
        torch.testing.assert_close(molf.merge(wrapped)(x), before)


def test_frozen_models_can_have_a_frozen_base_only():
    model = tiny_qwen2().requires_grad_(False)
    refused(model, FULL, r"all 7 matching linear layers are frozen", molf.with_adapter)
    MoLFAdamW.from_model(molf.with_adapter(model, E), E)


def test_plain_models_without_an_adapter():
    refused(tiny_qwen2(), E, r"trains a LoRA adapter.*Call molf.with_adapter\(model, config\)")
    dropout = MoLFConfig(ranks=(2, 3), lora_dropout=0.1)
    refused(tiny_qwen2(), dropout, r"lora_dropout=0.1 cannot be folded.*molf.with_adapter")


def test_weight_in_the_layout_of_inference(tmp_path):
    """On CPUs with AVX512-BF16 an evaluation leaves 4-bit weights where they have no gradient."""
    model = molf.with_adapter(quantised_qwen2(tiny_qwen2(), "bnb4", tmp_path), E)
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    weight.quant_state.packing_format_for_cpu = True
    refused(model, E, r"up_proj: since a forward pass in eval mode.* Load the model again")


def test_group_with_a_wrong_scaling_is_refused():
    model = molf.with_adapter(tiny_qwen2(), E)
    group = MoLFAdamW.from_model(model, E).param_groups[0]
    with pytest.raises(ValueError, match="Invalid adapter_scaling=0"):
        MoLFAdamW([{**group, "adapter_scaling": 0.0}])


def test_state_of_another_scaling_or_form_is_refused():
    model = spread(molf.with_adapter(tiny_qwen2(), E))
    saved = MoLFAdamW.from_model(model, E).state_dict()
    scaled = copy.deepcopy(model)
    for module in scaled.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = 2.0
    other = MoLFAdamW.from_model(scaled, E)
    with pytest.raises(ValueError, match=r"adapter_scaling=1.0 where this optimizer has 2.0"):
        other.load_state_dict(saved)
    explicit = molf.with_adapter(tiny_qwen2(), FULL)
    with pytest.raises(ValueError, match="Cannot load the optimizer state"):
        MoLFAdamW.from_model(explicit, FULL).load_state_dict(saved)
    assert torch.is_tensor(next(explicit.parameters()))
