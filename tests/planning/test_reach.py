"""What of a model a text does not reach, on models made for the question."""

import torch
from torch import nn

from molf import MoLFAdamW, MoLFConfig
from molf.core.model.linear_layers import find_layers
from molf.planning.reach import Reach, describe, find_reach


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x):
        return self.up(x)


class CrossLayer(Expert):
    """A layer that a text skips, in the list of those that it passes."""


class Block(nn.Module):
    def __init__(self, shares):
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))
        self.vision_experts = nn.ModuleList(Expert() for _ in range(2))
        self.by_weight = nn.Linear(4, 4)
        self.k_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.shares = shares

    def forward(self, x):
        x = self.experts[1](self.norm(x)) + x @ self.by_weight.weight.T
        return x if self.shares else self.k_proj(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(False), CrossLayer(), Block(True)])
        self.tower = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.trained_otherwise = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        for index in (0, 2):
            x = self.blocks[index](x)
        if self.training:
            x = nn.functional.linear(x, self.trained_otherwise.weight)
        else:
            x = self.trained_otherwise(x)
        return self.head(x)


UNREACHED = (
    "blocks.0.vision_experts",
    "blocks.1",
    "blocks.2.vision_experts",
    "blocks.2.k_proj",
    "tower",
)


def reach_of(model):
    return find_reach(model, lambda: model(torch.ones(1, 4)))


def test_towers_and_unused_layers_but_no_experts():
    assert reach_of(Model()).unreached == UNREACHED


def test_layers_that_are_used_without_being_called():
    found = ("blocks.0.by_weight", "blocks.2.by_weight", "trained_otherwise")
    assert reach_of(Model()).bypassed[:3] == found


def test_the_model_is_as_it_was():
    model = Model()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    reach_of(model)
    assert [module.training for module in model.modules()] == modes
    assert model.calls.item() == 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_excluding_modules_keeps_the_patterns():
    model = Model()
    for patterns in (("lm_head",), ("tied", "head"), r".*tied|(.*\.)?head", r"(?i).*TIED|HEAD"):
        config = MoLFConfig(ranks=(1,), exclude_modules=patterns)
        names = [name for name in ("tied", "head") if patterns == ("lm_head",)]
        if names:  # tied layers cannot be routed
            config = config.without(["head", "tied"])
        layers = {layer.name for layer in find_layers(model, config.without(UNREACHED))}
        assert layers == {
            *(f"blocks.{i}.experts.{k}.up" for i in (0, 2) for k in range(3)),
            *("blocks.0.by_weight", "blocks.2.by_weight", "blocks.0.k_proj", "trained_otherwise"),
        }
    assert MoLFConfig().without(()) == MoLFConfig()


def test_experts_without_tokens_stay_routed_and_take_no_step(recwarn):
    model = Model()
    config = MoLFConfig(ranks=(1,), exclude_modules=("tied", "head")).without(UNREACHED)
    optimizer = MoLFAdamW.from_model(model, config, weight_decay=0.5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    assert [str(warning.message) for warning in recwarn if "gradient" in str(warning.message)] == []
    assert "blocks.0.experts.1.up" in optimizer.routing
    assert "blocks.0.experts.0.up" not in optimizer.routing
    after = dict(model.named_parameters())
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".experts.0." in name or "tower" in name} <= still
    assert "blocks.0.experts.1.up.weight" not in still


def test_layers_without_a_gradient_are_named_without_blame():
    import pytest

    model = Model()
    config = MoLFConfig(ranks=(1,), exclude_modules=("tied", "head"))
    optimizer = MoLFAdamW.from_model(model, config)
    model(torch.randn(3, 4)).square().sum().backward()
    with pytest.warns(UserWarning, match="routed layers have no gradient in the first") as warned:
        optimizer.step()
    (text,) = [str(one.message) for one in warned if "no gradient" in str(one.message)]
    assert "a vision tower in training on text" in text
    assert "(first: blocks.0.vision_experts.0.up)" in text


def test_one_line_says_what_is_left_out():
    model = Model()
    text = describe(model, Reach(UNREACHED), in_adapter=False)
    assert text.startswith("Left out of the training: 7 linear layers (148 parameters) that")
    assert "blocks.*.vision_experts, blocks.*, blocks.*.k_proj, tower" in text
    assert describe(model, Reach((), ("blocks.0.by_weight",)), in_adapter=False) is None
    assert "blocks.*.by_weight" in describe(
        model, Reach((), ("blocks.0.by_weight",)), in_adapter=True
    )
    assert describe(model, Reach(), in_adapter=True) is None
