"""`nn.MultiheadAttention` is routed: its stacked q, k and v as one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core_helpers import assert_same_bits, snapshot, tiny_optimizer
from molf import MoLFAdamW, MoLFConfig

IN = "self_attn.in_proj"


def encoder(dtype: torch.dtype = torch.float32, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
    return layer.to(dtype)


def train(model: nn.Module, optimizer: MoLFAdamW, steps: range) -> None:
    width = model.linear1.in_features
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 3, width, generator=generator).to(model.linear1.weight.dtype)
        (model(x).float() * x.roll(1, 0).float()).sum().backward()
        optimizer.step()


def test_layers_of_a_transformer():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    optimizer = tiny_optimizer(model)
    routed = [group["layer"] for group in optimizer.param_groups if group["layer"]]
    assert routed == [
        *(f"encoder.layers.0.{end}" for end in (IN, "self_attn.out_proj", "linear1", "linear2")),
        f"decoder.layers.0.{IN}",
        "decoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.multihead_attn.in_proj",
        "decoder.layers.0.multihead_attn.out_proj",
        "decoder.layers.0.linear1",
        "decoder.layers.0.linear2",
    ]
    model(torch.ones(1, 3, 8), torch.ones(1, 2, 8)).square().sum().backward()
    optimizer.step()
    assert set(optimizer.routing) == set(routed)
    prefix = "encoder.layers.0.self_attn.in_proj_"
    assert optimizer.param_groups[0]["param_names"] == [f"{prefix}weight", f"{prefix}bias"]


def test_sides_of_their_own_make_three_layers_with_a_common_bias():
    model = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)
    optimizer = tiny_optimizer(model)
    names = [g["param_names"] for g in optimizer.param_groups if g["layer"]]
    assert names == [
        ["q_proj_weight"], ["k_proj_weight"], ["v_proj_weight"],
        ["out_proj.weight", "out_proj.bias"],
    ]  # fmt: skip
    inputs = torch.ones(1, 2, 8), torch.ones(1, 2, 6), torch.ones(1, 2, 4)
    model(*inputs)[0].square().sum().backward()
    optimizer.step()
    assert list(optimizer.routing) == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_patterns_choose_it():
    def names(**options):
        optimizer = tiny_optimizer(encoder(), **options)
        return [group["layer"] for group in optimizer.param_groups if group["layer"]]

    assert names(target_modules=["in_proj"]) == [IN]
    assert names(target_modules=r".*\.in_proj") == [IN]
    assert IN not in names(exclude_modules=["in_proj"])


def test_frozen_attention_is_left_out():
    model = encoder()
    model.self_attn.in_proj_weight.requires_grad_(False)
    optimizer = tiny_optimizer(model)
    assert IN not in [group["layer"] for group in optimizer.param_groups]


def test_the_full_expert_is_adamw():
    """With the full expert always winning and no decay, what moves is what AdamW moves."""
    model, plain = encoder(torch.float64), encoder(torch.float64)
    optimizer = MoLFAdamW.from_model(
        model, MoLFConfig(ranks=(2,), score="full"), lr=1e-2, weight_decay=0
    )
    train(model, optimizer, range(3))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0), range(3))
    # Softmax cancels the keys' bias: its gradient is rounding alone, which Adam makes large.
    width = model.self_attn.embed_dim
    keys = slice(width, 2 * width)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        mine, theirs = one.detach().clone(), other.detach()
        if name == "self_attn.in_proj_bias":
            assert one.grad[keys].abs().max() < 1e-12 < one.grad.abs().max()
            mine[keys] = theirs[keys]
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"weight_rounding": "stochastic"}),
        (torch.float32, {"state_dtype": "8bit"}),
        (torch.float32, {"optimizer_in_backward": True}),
        (torch.float64, {}),
    ],
    ids=["float32", "exact", "stochastic", "8bit", "backward", "float64"],
)
def test_resumes_bit_for_bit_with_every_storage(dtype, options):
    width = 64 if "state_dtype" in options else 8
    model, other = encoder(dtype, width), encoder(dtype, width)
    optimizer, resumed = tiny_optimizer(model, **options), tiny_optimizer(other, **options)
    train(model, optimizer, range(2))
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert_same_bits(snapshot(other, resumed), snapshot(model, optimizer))
    assert optimizer.routing == resumed.routing
    assert IN in optimizer.routing
    assert [A.shape for A, _ in optimizer.lora_factors(IN)] == [(2, width), (3, width)]


def test_tied_attention_is_refused():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    with pytest.raises(ValueError, match=r"Layer a.in_proj shares its weight with b.in_proj"):
        tiny_optimizer(model)
