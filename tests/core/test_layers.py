"""Which layers are routed, what is refused and what is warned of."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import molf
from core_helpers import Conv1D, feed, tiny_model, tiny_optimizer
from molf import MoLFAdamW, MoLFConfig
from molf.core.model.linear_layers import find_layers
from molf.core.model.module_names import clean_name


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 2, bias=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc = Attention(), Conv1D(4, 4)


class Decoder(nn.Module):
    """Two blocks of linear layers, a norm, an embedding, and a head that may be tied to it."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def names(model: nn.Module, **config) -> list[str]:
    return [layer.name for layer in find_layers(model, MoLFConfig(ranks=(1,), **config))]


BLOCK = ["attn.q_proj", "attn.k_proj", "fc"]
ALL = [f"layers.{i}.{end}" for i in (0, 1) for end in BLOCK]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ALL),
        ({"target_modules": ["q_proj"]}, ["layers.0.attn.q_proj", "layers.1.attn.q_proj"]),
        ({"target_modules": ["0.fc", "k_proj"]},
         ["layers.0.attn.k_proj", "layers.0.fc", "layers.1.attn.k_proj"]),
        ({"target_modules": r".*\.1\..*"}, ALL[3:]),
        ({"target_modules": r"layers\.0\.fc"}, ["layers.0.fc"]),
        ({"exclude_modules": ["fc", "lm_head"]}, [n for n in ALL if not n.endswith("fc")]),
        ({"exclude_modules": r".*attn.*|lm_head"}, ["layers.0.fc", "layers.1.fc"]),
        ({"exclude_modules": ()}, [*ALL, "lm_head"]),
        ({"target_modules": ["lm_head", "fc"], "exclude_modules": None},
         ["layers.0.fc", "layers.1.fc", "lm_head"]),
    ],
)  # fmt: skip
def test_patterns_choose_as_in_peft(config, expected):
    assert names(Decoder(), **config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj", "gate"]},
         "target_modules: 'gate' matches no linear layer. Linear layers of the model end in: "
         "q_proj, k_proj, fc, lm_head"),
        ({"target_modules": "q_proj"}, "'q_proj' matches no linear layer"),  # a whole-name regex
        ({"target_modules": ["proj"]}, "'proj' matches no linear layer"),  # an ending, by parts
        ({"target_modules": "[q"}, "not a regular expression"),
        ({"exclude_modules": ["head"]}, "exclude_modules: 'head' matches no linear layer"),
        ({"exclude_modules": ".*"}, "No layer is routed: exclude_modules"),
        ({"target_modules": ["lm_head"]}, "No layer is routed"),
    ],
)  # fmt: skip
def test_patterns_that_leave_nothing_name_what_there_is(config, message):
    with pytest.raises(ValueError, match=r"^(No layer|Invalid)") as raised:
        names(Decoder(), **config)
    assert message in str(raised.value)


def test_layers_know_their_shape():
    by_name = {layer.name: layer for layer in find_layers(Decoder(), MoLFConfig(ranks=(1,)))}
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": Conv1D(5, 3)})
    for layer in find_layers(model, MoLFConfig(ranks=(1,))):
        assert (layer.out_features, layer.in_features) == (5, 3)
    assert by_name["layers.0.fc"].transposed
    assert by_name["layers.0.attn.k_proj"].bias is None


def test_tied_head_is_never_routed_and_asking_for_it_is_an_error():
    model = Decoder(tied=True)
    assert names(model) == ALL
    optimizer = tiny_optimizer(model)
    feed(model, 0)
    optimizer.step()
    assert set(optimizer.routing) == set(ALL)
    with pytest.raises(ValueError, match="lm_head shares its weight with embed"):
        names(model, exclude_modules=())
    with pytest.raises(ValueError, match="lm_head shares its weight with embed"):
        names(model, target_modules=["lm_head"], exclude_modules=())


def test_models_without_linear_layers_or_with_frozen_ones_are_refused():
    with pytest.raises(ValueError, match=r"the model has no nn.Linear and no Conv1D"):
        names(nn.Sequential(nn.LayerNorm(3)))
    frozen = Decoder().requires_grad_(False)
    with pytest.raises(ValueError, match="all 6 matching linear layers are frozen"):
        names(frozen)
    frozen.layers[1].requires_grad_(True)
    assert names(frozen) == ALL[3:]


def test_frozen_bias_is_no_part_of_the_full_expert():
    model = nn.ModuleDict({"a": nn.Linear(3, 3)})
    model["a"].bias.requires_grad_(False)
    optimizer = tiny_optimizer(model)
    assert optimizer.param_groups[0]["params"] == [model["a"].weight]
    assert len(optimizer.param_groups) == 1


def test_frozen_weight_leaves_its_bias_to_plain_adamw():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["a"].weight.requires_grad_(False)
    optimizer = tiny_optimizer(model)
    assert [g["param_names"] for g in optimizer.param_groups] == [
        ["b.weight", "b.bias"],
        ["a.bias"],
    ]


@pytest.mark.parametrize("kind", ["ZeRO-3", "FSDP1"])
@pytest.mark.parametrize("form", ["folded", "adapter"])
def test_sharded_weights_are_refused(kind, form):
    config = MoLFConfig(ranks=(2,), freeze_base=form == "adapter")
    model = tiny_model()
    if form == "adapter":
        model = molf.with_adapter(model, config)
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()[: 0 if kind == "ZeRO-3" else None]
    with pytest.raises(
        ValueError, match=r"Layer up.* has a sharded weight, here of shape \(\d+,\)"
    ):
        MoLFAdamW.from_model(model, config)


def test_freeze_rest_trains_routed_weights_alone():
    model = Decoder()
    optimizer = tiny_optimizer(model, freeze_rest=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{name}.weight" for name in ALL]
    assert [g["param_names"] for g in optimizer.param_groups] == [[name] for name in trained]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype):
    """Floating-point numbers of eight bits have scales beside them."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = nn.Parameter(torch.zeros(3, 3, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"Layer b is quantised \({dtype}\)"):
        names(model)
    assert names(model, exclude_modules=["b"]) == ["a"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"freeze_base": True},
            r"freeze_base=True .* Call molf.with_adapter\(model, config\) first",
        ),
        (
            {"lora_dropout": 0.05},
            r"lora_dropout=0.05 .* Call molf.with_adapter\(model, config\) first",
        ),
    ],
)
def test_settings_that_need_the_adapter_form_are_refused(config, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message) as raised:
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(1,), **config))
    assert "\n" not in str(raised.value)


def test_large_ranks_are_warned_of_with_their_share():
    # 4x4 layers hold rank 3; k_proj [2, 4] does not: 2 of 6 layers, 16 of 80 weights.
    with pytest.warns(UserWarning, match=r"Rank 3 exceeds the smaller side of 2 of 6 routed "
                      r"layers \(20% of their weights; first: layers.0.attn.k_proj\)"):  # fmt: skip
        find_layers(Decoder(), MoLFConfig(ranks=(1, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_layers(Decoder(), MoLFConfig(ranks=(2,)))


def test_fused_expert_tensors_that_stay_frozen_are_said_to():
    model = Decoder()
    model.experts = nn.Parameter(torch.ones(3, 4, 4))
    model.more_experts = nn.Parameter(torch.ones(3, 4, 4), requires_grad=False)
    with pytest.warns(
        UserWarning, match=r"2 fused .* plain AdamW trains 1 of 2, the others stay frozen"
    ):
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(1,)))
    with pytest.warns(UserWarning, match=r"2 fused .* cannot be routed: they stay frozen"):
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(1,), freeze_rest=True))


def test_fused_expert_tensors_are_warned_of_and_take_plain_steps():
    model = Decoder()
    model.experts = nn.Parameter(torch.ones(3, 4, 4))
    model.conv = nn.Conv1d(2, 2, 3)  # 3-D as well, but no linear layers
    share = 48 / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=rf"1 fused 3-D weight .*{share:.0%} of the parameters"):
        optimizer = MoLFAdamW.from_model(model, MoLFConfig(ranks=(1,)))
    feed(model, 0)
    optimizer.step()
    assert (model.experts != 1).all()


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.bfloat16, {"weight_rounding": "nearest"}), (torch.float16, {})]
)
def test_weights_rounded_to_nearest_are_warned_of(dtype, options):
    with pytest.warns(UserWarning, match=rf"Trained weights are {dtype} and rounded to nearest"):
        MoLFAdamW.from_model(tiny_model(dtype), MoLFConfig(ranks=(2,)), **options)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("module.model.fc", "model.fc"),
        ("_orig_mod.model.fc", "model.fc"),
        ("_orig_mod.module.model.fc", "model.fc"),
        ("module._orig_mod.model.fc", "model.fc"),
        ("model.layers.0._orig_mod.fc.weight", "model.layers.0.fc.weight"),
        ("model._fsdp_wrapped_module.layers.1._checkpoint_wrapped_module.fc", "model.layers.1.fc"),
        ("encoder.submodule.fc", "encoder.submodule.fc"),
        ("encoder.module.fc", "encoder.module.fc"),
        ("", ""),
    ],
)
def test_wrappers_leave_no_trace_in_names(name, expected):
    assert clean_name(name) == expected


def test_compiled_model_has_the_same_names():
    model = Decoder()
    assert names(torch.compile(model)) == ALL
    model.layers[0] = torch.compile(model.layers[0])
    assert names(model) == ALL
    optimizer = tiny_optimizer(torch.compile(model))
    assert optimizer.param_groups[0]["param_names"] == [
        "layers.0.attn.q_proj.weight",
        "layers.0.attn.q_proj.bias",
    ]


def test_data_parallel_model_has_the_same_names_and_is_routed(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(tiny_model())
        optimizer = tiny_optimizer(model)
        model(torch.tensor([[1, 2, 3]])).square().mean().backward()
        optimizer.step()
        assert set(optimizer.routing) == {"up", "down"}
        assert optimizer.param_groups[2]["param_names"] == ["embed.weight", "lm_head.weight"]
    finally:
        torch.distributed.destroy_process_group()


def test_model_may_be_a_single_linear_layer():
    layer = nn.Linear(4, 3)
    optimizer = tiny_optimizer(layer)
    feed(layer, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert list(optimizer.routing) == [""]


def test_module_may_be_a_name_of_the_model_itself():
    """Stripped as if it were DDP's, it would give two layers one name, and one would be lost."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"a": nn.Linear(3, 3)}), "a": nn.Linear(3, 3)})
    assert names(model) == ["module.a", "a"]
    assert names(nn.DataParallel(model)) == ["module.a", "a"]
    wrapped = nn.Sequential()
    wrapped.add_module("_orig_mod", nn.DataParallel(model))
    assert names(wrapped) == ["module.a", "a"]


def test_layer_without_elements_is_not_routed():
    model = nn.ModuleDict({"a": nn.Linear(3, 0), "b": nn.Linear(3, 3)})
    optimizer = tiny_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert list(optimizer.routing) == ["b"]


def lazy(model: nn.ModuleDict) -> None:
    model["b"] = nn.LazyLinear(4)


def transposed(model: nn.ModuleDict) -> None:
    model["b"].weight = nn.Parameter(torch.zeros(6, 4))


def cut(model: nn.ModuleDict) -> None:
    model["b"].weight = nn.Parameter(torch.zeros(3, 6))


def flat(model: nn.ModuleDict) -> None:
    model["b"].weight = nn.Parameter(torch.zeros(24))


def complex_numbers(model: nn.ModuleDict) -> None:
    model["b"].to(torch.complex64)


def sparse(model: nn.ModuleDict) -> None:
    model["b"].weight = nn.Parameter(torch.eye(4, 6).to_sparse())


def whole_numbers(model: nn.ModuleDict) -> None:
    model["b"].weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int32), requires_grad=False)


def on_meta(model: nn.ModuleDict) -> None:
    model["b"].to("meta")


def shared_bias(model: nn.ModuleDict) -> None:
    model["b"].bias = model["a"].bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lazy, r"Layer b is lazy: its weight has no shape before the first forward pass"),
        (transposed, r"Layer b has a transposed weight, of shape \(6, 4\) .* say \(4, 6\)"),
        (cut, r"Layer b has a weight of shape \(3, 6\) where its features say \(4, 6\)"),
        (flat, r"Layer b has a sharded weight, here of shape \(24,\)"),
        (complex_numbers, r"Layer b has a complex weight \(torch.complex64\)"),
        (sparse, r"Layer b has a sparse weight \(torch.sparse_coo\)"),
        (whole_numbers, r"Layer b is quantised \(torch.int32\)"),
        (on_meta, r"Parameter b.weight is on the meta device and has no values"),
        (shared_bias, r"Layer b shares its bias with a: its gradient sums both uses"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_weights_that_cannot_be_routed_say_why_by_name(change, message):
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    change(model)
    with pytest.raises(ValueError, match=rf"^{message}") as raised:
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(1,)))
    assert "\n" not in str(raised.value)
    if change in (lazy, transposed, cut, complex_numbers):
        with pytest.raises(ValueError, match=rf"^{message}"):
            molf.with_adapter(model, MoLFConfig(ranks=(1, 1), freeze_base=True))
    if change is not on_meta:
        assert names(model, exclude_modules=["b"]) == ["a"]


@pytest.mark.parametrize("module", [nn.LazyConv1d(3, 1), nn.LayerNorm(4, device="meta")])
def test_other_parameters_without_values_are_refused(module):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": module})
    with pytest.raises(ValueError, match=r"^Parameter b.weight is (lazy|on the meta device)"):
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(1,)))


def test_lazy_layers_are_routed_once_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(5), nn.LazyLinear(3))
    model(torch.ones(2, 4))
    assert names(model) == ["0", "1"]


def test_bias_shared_with_a_layer_that_is_not_routed():
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)})
    shared_bias(model)
    assert names(model, exclude_modules=["b"]) == ["a"]
    assert names(model, freeze_rest=True) == ["a", "b"]


def test_weight_with_other_strides_is_routed():
    model = nn.ModuleDict({"a": nn.Linear(6, 4)})
    plain = nn.ModuleDict({"a": nn.Linear(6, 4)})
    plain.load_state_dict(model.state_dict())
    model["a"].weight = nn.Parameter(model["a"].weight.detach().t().contiguous().t())
    for one in (model, plain):
        optimizer = tiny_optimizer(one)
        for seed in range(3):
            feed(one, seed)
            optimizer.step()
    torch.testing.assert_close(model["a"].weight, plain["a"].weight)
