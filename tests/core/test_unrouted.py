"""What is not routed is counted, and named where one could expect it to be routed."""

from __future__ import annotations

import copy
import pickle
import time
import warnings

import pytest
import torch
from torch import nn

import molf
from core_helpers import tiny_model, tiny_optimizer
from molf import MoLFAdamW, MoLFConfig
from molf.core.model.coverage import coverage_of

SMALL = MoLFConfig(ranks=(2,))


def said(model: nn.Module, config: MoLFConfig = SMALL) -> tuple[MoLFAdamW, list[str]]:
    """The optimizer, and what was warned of while it was built."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = MoLFAdamW.from_model(model, config, lr=1e-2)
    return optimizer, [str(one.message) for one in caught if "Rank" not in str(one.message)]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.rnn, self.out = nn.Embedding(9, 8), kind(8, 8), nn.Linear(8, 9)


class Raw(nn.Module):
    """Parameters of a module's own beside a linear layer."""

    def __init__(self, **parameters: torch.Tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))


class MoE(Raw):
    """A mixture whose parameters have no telling names."""


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell])
def test_recurrent_weights_are_named_with_their_share(kind):
    model = Recurrent(kind)
    _, (text,) = said(model)
    of_rnn = sum(p.numel() for p in model.rnn.parameters() if p.dim() == 2)
    share = of_rnn / sum(p.numel() for p in model.parameters())
    assert text.startswith(f"2 {kind.__name__} weights ({share:.0%} of the parameters; first: rnn.")
    assert text.endswith("cannot be routed: they take plain AdamW steps.")


@pytest.mark.parametrize(
    ("module", "kind", "first"),
    [
        (nn.Bilinear(8, 8, 8), "Bilinear", "more.weight"),
        (nn.Conv1d(8, 8, 3), "Conv1d", "more.weight"),
        (nn.Conv2d(8, 8, 3), "Conv2d", "more.weight"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3)), "Conv1d",
         "more.parametrizations.weight.original1"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv1d(8, 8, 3)), "Conv1d",
         "more.parametrizations.weight.original"),
        (Raw(queries=torch.ones(4, 3, 8)), "Raw", "more.queries"),
    ],
)  # fmt: skip
def test_other_matrices_are_no_mixture_of_experts(module, kind, first):
    _, (text,) = said(nn.ModuleDict({"fc": nn.Linear(8, 8), "more": module}))
    assert text.startswith(f"1 {kind} weight (")
    assert f"; first: {first})" in text
    assert "mixture" not in text


def test_weight_norm_of_old_is_named_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = torch.nn.utils.weight_norm(nn.Conv1d(8, 8, 3))
    optimizer, (text,) = said(nn.ModuleDict({"fc": nn.Linear(8, 8), "more": conv}))
    assert text.startswith("1 Conv1d weight (")
    without = next(g for g in optimizer.param_groups if not g["layer"] and not g["weight_decay"])
    assert "more.weight_g" in without["param_names"]


@pytest.mark.parametrize(
    "model",
    [
        Raw(experts=torch.ones(3, 8, 8)),
        MoE(w1=torch.ones(3, 8, 8)),
        nn.ModuleDict({"fc": nn.Linear(8, 8), "moe": Raw(w1=torch.ones(3, 8, 8))}),
    ],
)
def test_experts_are_known_by_a_name_or_a_class(model):
    _, (text,) = said(model)
    assert text.startswith("1 fused 3-D weight (mixture-of-experts; ")


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(),
        Raw(position_embeddings=torch.ones(1, 20, 8), cls_token=torch.ones(1, 1, 8)),
        Raw(A_log=torch.ones(8, 4), expert_bias=torch.ones(4, 8)),
        nn.ModuleDict({"fc": nn.Linear(8, 8), "patch_embed": nn.Conv2d(3, 8, 4)}),
        nn.ModuleDict({"fc": nn.Linear(8, 8), "norm": nn.LayerNorm((4, 8))}),
        nn.ModuleDict({"fc": nn.Linear(99, 99), "conv": nn.Conv1d(2, 2, 3)}),  # below one percent
    ],
)
def test_embeddings_norms_heads_and_what_is_small_are_no_news(model):
    _, texts = said(model)
    assert texts == []


def test_layers_that_the_configuration_leaves_out_are_no_news():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.MultiheadAttention(8, 2)})
    _, texts = said(model, MoLFConfig(ranks=(2,), exclude_modules=["in_proj", "out_proj"]))
    assert texts == []


def test_coverage_counts_everything_once():
    model = Recurrent(nn.LSTM)
    model.extra = nn.Linear(9, 8, bias=False)
    model.extra.weight = model.embed.weight  # tied
    model.frozen = nn.Linear(8, 8).requires_grad_(False)
    config = MoLFConfig(ranks=(2,), exclude_modules=["extra"])
    optimizer, _ = said(model, config)
    coverage = optimizer.coverage
    total = sum(p.numel() for p in model.parameters())
    assert (coverage.layers, coverage.routed, coverage.parameters) == (1, 81, total)
    assert coverage.routed + sum(one.parameters for one in coverage.unrouted) == total
    by_kind = {(one.kind, one.is_matrix): one for one in coverage.unrouted}
    assert by_kind["LSTM", True].names == ("rnn.weight_ih_l0", "rnn.weight_hh_l0")
    assert by_kind["Embedding", False].trained == 1
    assert by_kind["Linear", False].trained == 0
    assert by_kind["Linear", False].names == ("frozen.weight", "frozen.bias")
    text = str(coverage)
    assert f"{81 / total:.1%} of {total:,} parameters are routed, in 1 layer" in text
    assert "LSTM, 2 tensors (plain AdamW): rnn.weight_ih_l0, rnn.weight_hh_l0" in text
    assert "Linear, 2 tensors (frozen): frozen.weight, frozen.bias" in text


def test_coverage_stays_with_copies():
    optimizer = tiny_optimizer(tiny_model())
    assert copy.deepcopy(optimizer).coverage == optimizer.coverage
    assert pickle.loads(pickle.dumps(optimizer)).coverage == optimizer.coverage


def test_adapters_are_no_part_of_what_is_covered():
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    config = MoLFConfig(ranks=(2,), freeze_base=True)
    optimizer = MoLFAdamW.from_model(molf.with_adapter(model, config), config)
    coverage = optimizer.coverage
    assert (coverage.layers, coverage.parameters) == (2, total)
    assert coverage.routed == model.up.weight.numel() + model.down.weight.numel()
    assert {one.trained for one in coverage.unrouted} == {0}


def test_thousands_of_adapted_layers_are_counted_at_once():
    """A mixture has as many; comparing each with each takes minutes."""
    layers = nn.ModuleList()
    for _ in range(4000):
        layer = nn.Module()
        layer.adapter_layer_names = ("lora_A",)
        layer.base_layer, layer.lora_A = nn.Linear(1, 1), nn.Linear(1, 1)
        layers.append(layer)
    started = time.process_time()
    coverage = coverage_of(layers, (), 0, trains_rest=False)
    assert time.process_time() - started < 3
    assert coverage.parameters == 2 * 4000


def test_what_an_adapter_cannot_have_is_said():
    """`nn.MultiheadAttention` uses its layers' weights and never calls them."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    config = MoLFConfig(ranks=(2,), freeze_base=True)
    adapted = molf.with_adapter(model, config)
    optimizer, texts = said(adapted, config)
    assert [g["layer"] for g in optimizer.param_groups] == ["linear1", "linear2"]
    (text,) = [one for one in texts if "cannot be" in one]
    assert text.startswith("2 MultiheadAttention weights (")
    assert text.endswith("cannot be routed: they stay frozen.")


def test_attention_that_peft_adapts_is_covered():
    import peft

    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["self_attn"]))
    config = MoLFConfig(ranks=(1, 1), freeze_base=True)
    optimizer, _ = said(adapted, config)
    adapted.base_model.model(torch.ones(2, 3, 8)).square().sum().backward()
    optimizer.step()
    assert list(optimizer.routing) == ["self_attn", "self_attn.out_proj"]
    unrouted = [name for one in optimizer.coverage.unrouted for name in one.names]
    assert "self_attn.in_proj_weight" not in unrouted
