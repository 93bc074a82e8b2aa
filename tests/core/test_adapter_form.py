"""MoLF over PEFT adapters: what is trained, what stays, and that it is the folded form's path."""

from __future__ import annotations

import copy
import math
import warnings

import peft
import pytest
import torch
from torch import nn

import molf
from molf import MoLFAdamW, MoLFConfig
from molf.core.model.factors import draw_lora_a
from peft_helpers import IDS, logits, quantised_qwen2, spread, tiny_qwen2

RANKS = (2, 3)
UP = "model.layers.0.mlp.up_proj"


def config_of(**options) -> MoLFConfig:
    return MoLFConfig(**{"ranks": RANKS, "alpha": 4.0, "freeze_base": True, **options})


def optimizer_of(model: nn.Module, config: MoLFConfig, **options) -> MoLFAdamW:
    return MoLFAdamW.from_model(model, config, **{"lr": 1e-2, **options})


def train(model: nn.Module, optimizer: MoLFAdamW, steps: int = 3, start: int = 0) -> list[float]:
    losses = []
    model.train()
    for step in range(start, start + steps):
        ids = (IDS + step) % 32
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def linears(model: nn.Module) -> dict[str, torch.Tensor]:
    """Effective weights of the seven layers, adapters merged, in float64."""
    plain = molf.merge(copy.deepcopy(model))
    return {n: m.weight.detach().double() for n, m in plain.named_modules() if n.endswith("_proj")}


def test_configuration_is_an_ordinary_one():
    settings = molf.peft_config(config_of(lora_dropout=0.1), task_type="CAUSAL_LM")
    assert type(settings) is peft.LoraConfig
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (5, 5, False)
    assert (settings.lora_dropout, settings.target_modules) == (0.1, "all-linear")
    assert settings.task_type == "CAUSAL_LM"
    listed = molf.peft_config(config_of(target_modules=["q_proj"], exclude_modules=["1.q_proj"]))
    assert listed.target_modules == {"q_proj"}
    assert listed.exclude_modules == {"1.q_proj"}
    with pytest.raises(TypeError, match="r"):
        molf.peft_config(config_of(), r=7)


def test_peft_model_of_the_configuration_is_routed():
    config = config_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.get_peft_model(tiny_qwen2(), molf.peft_config(config))
        optimizer = optimizer_of(model, config)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer)
    names = [n for n, m in tiny_qwen2().named_modules() if n.endswith("_proj")]
    assert list(optimizer.routing) == names
    assert len(names) == 7
    assert all(tuple(d.scores) == ("lora0_r2", "lora1_r3") for d in optimizer.routing.values())
    group = optimizer.param_groups[0]
    prefix = f"{names[0]}.lora_"
    assert group["param_names"] == [f"{prefix}A.default.weight", f"{prefix}B.default.weight"]
    assert group["adapter_scaling"] == 1.0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is ("lora_" not in name), name


def test_only_the_winners_slices_move():
    config = config_of()
    model = spread(molf.with_adapter(tiny_qwen2(), config))
    optimizer = optimizer_of(model, config)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    seen = set()
    for name, decision in optimizer.routing.items():
        (winner,) = decision.winners
        seen.add(winner)
        rows = slice(0, 2) if winner == "lora0_r2" else slice(2, 5)
        tuner = model.base_model.model.get_submodule(name)
        for factor, dim in (("lora_A", 0), ("lora_B", 1)):
            key = f"base_model.model.{name}.{factor}.default.weight"
            moved = (getattr(tuner, factor)["default"].weight != before[key]).any(1 - dim)
            assert moved[rows].all(), (name, factor)
            assert moved.sum() == len(range(*rows.indices(5))), (name, factor)
    assert seen <= {"lora0_r2", "lora1_r3"}


@pytest.mark.parametrize("score", ["epd", "pfn", "random", "full", "lora"])
def test_explicit_form_is_the_folded_form(score):
    """Without dropout both train the same: same start, same winners, same effective weights."""
    config = MoLFConfig(ranks=RANKS, alpha=4.0, score=score, top_k=1)
    options = {"lora_lr": (1e-2, 3e-2), "weight_decay": 0.1, "lora_weight_decay": 0.05, "eps": 1e-6}
    folded = tiny_qwen2(tied=True).double()
    explicit = molf.with_adapter(tiny_qwen2(tied=True).double(), config)
    pair = [(model, optimizer_of(model, config, **options)) for model in (folded, explicit)]
    for step in range(12):
        losses = [train(model, optimizer, 1, step) for model, optimizer in pair]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        first, second = (optimizer.routing for _, optimizer in pair)
        assert {n: d.winners for n, d in first.items()} == {n: d.winners for n, d in second.items()}
    for name, weight in linears(explicit).items():
        torch.testing.assert_close(folded.get_submodule(name).weight.detach(), weight)
        for one, two in zip(*(o.lora_factors(name) for _, o in pair), strict=True):
            torch.testing.assert_close(one, two)
    torch.testing.assert_close(
        explicit.base_model.model.model.embed_tokens.weight, folded.model.embed_tokens.weight
    )
    expected = {"folded": trainable(folded), "explicit": trainable(explicit)}
    assert len(expected["explicit"]) == len(expected["folded"]) + 14


def test_adapter_starts_as_the_folded_form_does():
    config = config_of(seed=3)
    state = torch.get_rng_state()
    model = molf.with_adapter(tiny_qwen2(), config)
    torch.manual_seed(0)
    folded = optimizer_of(tiny_qwen2(), MoLFConfig(ranks=RANKS, alpha=4.0, seed=3))
    optimizer = optimizer_of(model, config)
    for (A, B), (other_A, other_B) in zip(
        optimizer.lora_factors(UP), folded.lora_factors(UP), strict=True
    ):
        assert torch.equal(A, other_A)
        assert not B.any()
        assert B.shape == other_B.shape
    stored = model.base_model.model.get_submodule(UP).lora_A["default"].weight
    assert torch.equal(stored, draw_lora_a(3, UP, RANKS, 64))
    torch.set_rng_state(state)
    molf.with_adapter(tiny_qwen2(), config)
    drawn = torch.rand(1)
    tiny_qwen2()
    assert torch.equal(drawn, torch.rand(1))  # nothing between seeding and here has drawn


def test_factors_are_those_of_the_paper():
    """`sum_i s_i B_i A_i` of what is read is what the adapter adds; what is written is read."""
    config = config_of(alpha=(3.0, 5.0), use_rslora=False)
    settings = molf.peft_config(config)
    settings.lora_alpha, settings.use_rslora = 7, True
    model = spread(peft.get_peft_model(tiny_qwen2(), settings))
    optimizer = optimizer_of(model, config)
    tuner = model.base_model.model.get_submodule(UP)
    assert tuner.scaling["default"] == pytest.approx(7 / math.sqrt(5))
    factors = optimizer.lora_factors(UP)
    total = sum(s * B @ A for s, (A, B) in zip((3 / 2, 5 / 3), factors, strict=True))
    torch.testing.assert_close(total, tuner.get_delta_weight("default"))
    doubled = [(2 * A, B - 1) for A, B in factors]
    optimizer.set_lora_factors(UP, doubled)
    total = sum(s * B @ A for s, (A, B) in zip((3 / 2, 5 / 3), doubled, strict=True))
    torch.testing.assert_close(tuner.get_delta_weight("default"), total)
    for one, two in zip(optimizer.lora_factors(UP), doubled, strict=True):
        torch.testing.assert_close(one, two)
    with pytest.raises(ValueError, match="Invalid factors for"):
        optimizer.set_lora_factors(UP, doubled[::-1])


def numbers(parameter: nn.Parameter) -> torch.Tensor:
    """What a parameter stores, packed where it is quantised."""
    return getattr(parameter, "qdata", parameter.data)


@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao"])
def test_quantised_bases_are_trained_beside(kind, tmp_path):
    config = config_of(ranks=(2, 6))
    base = quantised_qwen2(tiny_qwen2(), kind, tmp_path)
    model = molf.with_adapter(base, config)
    before = {n: numbers(p).clone() for n, p in model.named_parameters() if "lora_" not in n}
    kinds = {name: type(model.get_parameter(name)) for name in before}
    optimizer = optimizer_of(model, config, lr=3e-2)
    losses = [train(model, optimizer, 1)[0] for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]
    assert len(optimizer.routing) == 7
    assert trainable(model) == [n for n, _ in model.named_parameters() if "lora_" in n]
    for name, value in before.items():
        parameter = model.get_parameter(name)
        assert torch.equal(numbers(parameter), value), name
        assert type(parameter) is kinds[name]


@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao"])
def test_evaluation_between_steps_changes_nothing(kind, tmp_path):
    config = config_of()
    models = []
    for index in range(2):
        base = quantised_qwen2(tiny_qwen2(layers=2), kind, tmp_path / str(index))
        models.append(peft.get_peft_model(base, molf.peft_config(config)))
        models[-1].load_state_dict(models[0].state_dict(), strict=False)
    optimizers = [optimizer_of(model, config) for model in models]
    for step in range(3):
        with torch.no_grad():
            models[1].eval()(input_ids=IDS)
        losses = [train(*pair, 1, step) for pair in zip(models, optimizers, strict=True)]
        assert losses[0] == losses[1]
    assert optimizers[0].routing == optimizers[1].routing


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bnb4", "bnb8", "torchao"])
def test_quantised_bases_are_trained_beside_on_a_gpu(kind, tmp_path):
    config = config_of(ranks=(2, 6))
    original = tiny_qwen2()
    model = molf.with_adapter(quantised_qwen2(original, kind, tmp_path).cuda(), config)
    optimizer = optimizer_of(model, config, lr=3e-2)
    ids = IDS.cuda()
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    reports: list[molf.MergeReport] = []
    molf.merge(model, base="dequantised", sample=ids, report=reports.append)
    assert reports[0].logit_difference["dequantised"] < 0.1 * reports[0].largest_logit


def test_transposed_layers_carry_the_same_adapter():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    plain = GPT2LMHeadModel(GPT2Config(**sizes, **dropout)).double()
    config = MoLFConfig(ranks=RANKS, alpha=4.0, top_k=2)
    explicit = molf.with_adapter(copy.deepcopy(plain), config)
    optimizers = [optimizer_of(model, config) for model in (plain, explicit)]
    for model, optimizer in zip((plain, explicit), optimizers, strict=True):
        train(model, optimizer, 4)
    assert len(optimizers[0].routing) == 4
    assert [d.winners for d in optimizers[0].routing.values()] == [
        d.winners for d in optimizers[1].routing.values()
    ]
    merged = molf.merge(explicit)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value)


@pytest.mark.parametrize("freeze_base", [True, False])
def test_dropout_is_pefts(freeze_base):
    config = config_of(lora_dropout=0.5, freeze_base=freeze_base)
    model = spread(molf.with_adapter(tiny_qwen2(), config))
    tuner = model.base_model.model.get_submodule(UP)
    assert tuner.lora_dropout["default"].p == 0.5
    torch.manual_seed(1)
    x = torch.randn(3, 64)
    y = tuner.train()(x) - tuner.base_layer(x)
    torch.manual_seed(1)
    x = torch.randn(3, 64)
    masked = nn.functional.dropout(x, 0.5)  # one mask, shared by the experts
    torch.testing.assert_close(
        y, masked @ tuner.get_delta_weight("default").t(), rtol=1e-4, atol=1e-5
    )
    optimizer = optimizer_of(model, config)
    losses = [train(model, optimizer, 1)[0] for _ in range(25)]
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_of_the_configuration_that_the_adapter_lacks_is_warned_of():
    model = peft.get_peft_model(tiny_qwen2(), molf.peft_config(config_of()))
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 .* is not that of adapter 'default'"):
        optimizer_of(model, config_of(lora_dropout=0.1))


@pytest.mark.parametrize("freeze_base", [True, False])
def test_every_expert_has_a_gradient_under_checkpointing(freeze_base):
    config = config_of(freeze_base=freeze_base)
    models = [spread(molf.with_adapter(tiny_qwen2(layers=2), config)) for _ in range(2)]
    models[1].gradient_checkpointing_enable({"use_reentrant": False})
    optimizers = [optimizer_of(model, config) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1)
    routing = optimizers[1].routing
    assert len(routing) == 14
    assert all(score > 0 for d in routing.values() for score in d.scores.values())
    assert routing == optimizers[0].routing


def test_layers_that_get_no_gradient_are_warned_of():
    config = config_of()
    model = molf.with_adapter(tiny_qwen2(), config)
    optimizer = optimizer_of(model, config)
    with pytest.warns(UserWarning, match=r"7 of 7 routed layers have no gradient .*q_proj"):
        optimizer.step()
    train(model, optimizer, 1)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="No parameter has a gradient in this step"):
        optimizer.step()
    assert optimizer.routing == {}


def test_half_a_layers_gradients_are_an_error():
    config = config_of(freeze_base=False)
    model = molf.with_adapter(tiny_qwen2(), config)
    optimizer = optimizer_of(model, config)
    model.base_model.disable_adapter_layers()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(RuntimeError, match=r"lora_A and lora_B got no gradient"):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_a_bias_alone_with_a_gradient_is_an_error():
    config = config_of(freeze_base=False)
    model = molf.with_adapter(tiny_qwen2(), config)
    optimizer = optimizer_of(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name and name.endswith("bias"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    match = r"q_proj: lora_A and lora_B and weight got no gradient while the rest"
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()


def test_saved_adapter_goes_on_where_it_was(tmp_path):
    config = config_of()
    model = molf.with_adapter(tiny_qwen2(), config)
    optimizer = optimizer_of(model, config)
    train(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    again = peft.PeftModel.from_pretrained(tiny_qwen2(), tmp_path, is_trainable=True)
    resumed = optimizer_of(again, config)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert train(again, resumed, 3, 3) == train(model, optimizer, 3, 3)
    assert resumed.routing == optimizer.routing
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_peft_merges_and_disables_it():
    config = config_of()
    model = molf.with_adapter(tiny_qwen2(), config)
    start = logits(model)
    train(model, optimizer_of(model, config), 3)
    trained = logits(model)
    assert (trained - start).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), start)
    torch.testing.assert_close(logits(molf.merge(copy.deepcopy(model))), trained)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained)


def test_one_of_several_adapters_is_trained():
    config = config_of()
    model = peft.get_peft_model(
        tiny_qwen2(), peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="first"
    )
    model.add_adapter("second", molf.peft_config(config))
    with pytest.raises(ValueError, match=r"'first' has rank 4, but ranks=\[2, 3\] need 5"):
        optimizer_of(model, config)
    model.set_adapter("second")
    optimizer = optimizer_of(model, config)
    first = {n: p.detach().clone() for n, p in model.named_parameters() if ".first." in n}
    train(model, optimizer, 2)
    assert len(optimizer.routing) == 7
    assert optimizer.param_groups[0]["param_names"][0].endswith("lora_A.second.weight")
    for name, value in first.items():
        assert torch.equal(model.get_parameter(name), value), name


def test_frozen_adapter_beside_the_trained_one_counts_as_base():
    config = config_of()
    model = peft.get_peft_model(tiny_qwen2(), molf.peft_config(config), adapter_name="old")
    spread(model)
    model.add_adapter("new", molf.peft_config(config))
    model.base_model.set_adapter(["old", "new"])
    with pytest.raises(ValueError, match=r"Adapters 'old', 'new' are active and trainable at once"):
        optimizer_of(model, config)
    for name, parameter in model.named_parameters():
        if ".old." in name:
            parameter.requires_grad_(False)
    optimizer = optimizer_of(model, config)
    old = {n: p.detach().clone() for n, p in model.named_parameters() if ".old." in n}
    before = logits(model)
    train(model, optimizer, 2)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in old.items())
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(molf.merge(model)), after)  # both adapters


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"freeze_base": True}, {"lora"}),
        ({"freeze_base": True, "freeze_rest": False}, {"lora", "norm", "embed", "bias"}),
        ({"freeze_base": False}, {"lora", "norm", "embed", "bias", "weight"}),
        ({"freeze_base": False, "freeze_rest": True}, {"lora", "weight"}),
    ],
)
def test_what_is_frozen(options, expected):
    config = config_of(**options)
    model = molf.with_adapter(tiny_qwen2(), config)

    def kinds() -> set[str]:
        found = set()
        for name in trainable(model):
            ends = ("lora", "norm", "embed", "proj.base_layer.bias", "proj.base_layer.weight")
            (end,) = (end for end in ends if end in name)
            found.add(end.rpartition(".")[2])
        return found

    assert kinds() == expected
    optimizer = optimizer_of(model, config)
    assert kinds() == expected
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 2)
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    assert owned == {p for p in model.parameters() if p.requires_grad}
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    moved -= {"base_model.model.lm_head.weight"}  # tied
    assert moved <= set(trainable(model))
    assert any("norm" in name for name in moved) is ("norm" in expected)
    routed = [g for g in optimizer.param_groups if g["layer"]]
    has_bias = sum(len(g["params"]) == 4 for g in routed)
    assert has_bias == (3 if options == {"freeze_base": False} else 0)


def test_parameters_that_were_frozen_stay_frozen():
    config = config_of(freeze_base=False)
    plain = tiny_qwen2(layers=2)
    plain.model.embed_tokens.requires_grad_(False)
    plain.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model = molf.with_adapter(plain, config)
    optimizer = optimizer_of(model, config)
    assert len([g for g in optimizer.param_groups if g["layer"]]) == 13  # as in the folded form
    assert not any("embed" in n or "1.mlp.up_proj" in n for n in trainable(model))


@pytest.mark.parametrize("freeze_rest", [None, False, True])
def test_what_the_users_adapter_trains_besides(freeze_rest):
    config = config_of(freeze_rest=freeze_rest)
    settings = molf.peft_config(config, modules_to_save=["model.norm"], bias="lora_only")
    model = peft.get_peft_model(tiny_qwen2(), settings)
    rest = [name for name in trainable(model) if "lora_" not in name]
    assert len(rest) == 4  # a norm and three biases
    if freeze_rest is None:
        with pytest.warns(UserWarning, match="freezes 4 trainable parameters outside the adapter"):
            optimizer = optimizer_of(model, config)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = optimizer_of(model, config)
    assert (set(rest) <= set(trainable(model))) is (freeze_rest is False)
    before = {name: model.get_parameter(name).detach().clone() for name in rest}
    train(model, optimizer, 2)
    moved = [name for name in rest if not torch.equal(model.get_parameter(name), before[name])]
    assert moved == (rest if freeze_rest is False else [])
    plain = molf.merge(copy.deepcopy(model))
    torch.testing.assert_close(logits(plain), logits(model))


def test_trainable_tokens_are_trained_besides():
    config = config_of(freeze_rest=False)
    settings = molf.peft_config(config, trainable_token_indices=[3, 4])
    model = peft.get_peft_model(tiny_qwen2(), settings)
    optimizer = optimizer_of(model, config)
    train(model, optimizer, 3)
    delta = next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)
    assert optimizer.state[delta]["step"] == 3
    torch.testing.assert_close(logits(molf.merge(copy.deepcopy(model))), logits(model))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"freeze_base": False}, "q_proj.weight"),
        ({"freeze_rest": False}, "embed_tokens.weight"),
        ({}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("own", [False, True], ids=["with_adapter", "get_peft_model"])
def test_what_is_not_saved_is_warned_of(options, first, own, tmp_path):
    """`with_adapter` makes a model that saves all; PEFT's own one saves its adapter alone."""
    config = config_of(**options)
    model = tiny_qwen2()
    if own:
        model = peft.get_peft_model(model, molf.peft_config(config, task_type="CAUSAL_LM"))
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad or config.freeze_rest is False)
    model = molf.with_adapter(model, config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        optimizer = optimizer_of(model, config)
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    is_lost = own and first is not None
    assert len(texts) == is_lost
    assert not is_lost or f"{first}): PEFT's save_pretrained" in texts[0]
    train(model, optimizer, 2)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny_qwen2(), tmp_path)
    assert torch.equal(logits(again), logits(model)) is not is_lost
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_native_adapters_of_transformers_are_routed():
    config = config_of()
    model = tiny_qwen2()
    model.add_adapter(molf.peft_config(config, target_modules=["up_proj", "q_proj"]))
    optimizer = optimizer_of(model, config)
    train(model, optimizer, 2)
    assert list(optimizer.routing) == ["model.layers.0.self_attn.q_proj", UP]


def test_existing_adapter_gets_a_trainable_base():
    """The way out that the error message of a frozen base names."""
    config = config_of(freeze_base=False)
    model = spread(peft.get_peft_model(tiny_qwen2(), molf.peft_config(config), "mine"))
    with pytest.raises(ValueError, match=r"molf.with_adapter\(model, config\)"):
        optimizer_of(model, config)
    before = logits(model)
    assert molf.with_adapter(model, config) is model
    assert torch.equal(logits(model), before)
    optimizer = optimizer_of(model, config)
    train(model, optimizer, 1)
    assert all(next(iter(d.scores)) == "full" for d in optimizer.routing.values())


def test_names_are_the_models_own_inside_wrappers():
    config = config_of()
    model = molf.with_adapter(tiny_qwen2(), config)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model)):
        optimizer = optimizer_of(wrapped, config)
        layers = [g["layer"] for g in optimizer.param_groups]
        assert layers[0] == "model.layers.0.self_attn.q_proj"
        assert len(layers) == 7


def test_data_parallel_models_are_routed(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        config = config_of()
        model = nn.parallel.DistributedDataParallel(molf.with_adapter(tiny_qwen2(), config))
        optimizer = optimizer_of(model, config)
        train(model, optimizer, 2)
        assert next(iter(optimizer.routing)) == "model.layers.0.self_attn.q_proj"
        assert type(molf.merge(model)).__name__ == "Qwen2ForCausalLM"
    finally:
        torch.distributed.destroy_process_group()


def test_model_prepared_for_kbit_training(tmp_path):
    """What PEFT's documentation does to a 4-bit base: float32 norms, checkpointing, input grads."""
    config = config_of(lora_dropout=0.05)
    base = peft.prepare_model_for_kbit_training(
        quantised_qwen2(tiny_qwen2(layers=2), "bnb4", tmp_path),
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = peft.get_peft_model(base, molf.peft_config(config, task_type="CAUSAL_LM"))
    optimizer = optimizer_of(model, config, lr=3e-2)
    losses = [train(model, optimizer, 1)[0] for _ in range(15)]
    assert losses[-1] < 0.95 * losses[0]
    assert len(optimizer.routing) == 14


def test_any_module_with_linear_layers_can_be_adapted():
    from core_helpers import backward, tiny_model

    for freeze_base in (True, False):
        config = config_of(freeze_base=freeze_base)
        model = molf.with_adapter(tiny_model(), config)
        optimizer = optimizer_of(model, config)
        before = copy.deepcopy(model.state_dict())
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(11, (4, 5), generator=generator)
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        assert list(optimizer.routing) == ["up", "down"]
        assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plain = tiny_model()
    backward(plain, 0)
    assert molf.merge(model).up.weight.shape == plain.up.weight.shape


def test_adapters_on_exactly_the_layers_that_the_patterns_choose():
    """PEFT matches endings; a name that is another's ending must not bring that one along."""
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "inner": nn.ModuleDict({"up": nn.Linear(4, 4)})})
    config = config_of(ranks=(1,), alpha=1.0, exclude_modules=["inner.up"])
    adapted = molf.with_adapter(model, config)
    assert [g["layer"] for g in optimizer_of(adapted, config).param_groups] == ["up"]
