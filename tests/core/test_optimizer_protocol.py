"""What anybody may do with a `torch.optim.Optimizer`: closures, groups, schedulers, hooks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from core_helpers import (
    assert_same_bits,
    backward,
    feed,
    run,
    snapshot,
    tiny_model,
    tiny_optimizer,
)
from molf import AdamW, MoLFAdamW, MoLFConfig
from optimizer_forms import FORMS, in_form


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def optimizer(model):
    return tiny_optimizer(model)


def test_step_without_closure_or_gradients_does_nothing(model, optimizer):
    before = snapshot(model, optimizer)
    assert optimizer.step() is None
    assert_same_bits(snapshot(model, optimizer), before)
    assert optimizer.routing == {}


def test_parameters_carry_their_names_and_are_owned_once(model, optimizer):
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["up.weight", "up.bias"],
        ["down.weight"],
        ["embed.weight", "lm_head.weight"],
        ["norm.weight", "norm.bias"],
    ]
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) == len(list(model.parameters()))
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.1, 0.1, 0.1, 0.0]
    assert [group.get("bias_weight_decay") for group in optimizer.param_groups[:2]] == [0.0, 0.0]


def test_added_group_takes_plain_adamw_steps(model, optimizer):
    torch.manual_seed(1)
    extra = nn.Parameter(torch.randn(3, 4))
    scalar = nn.Parameter(torch.tensor(2.0))
    plain = [p.detach().clone().requires_grad_() for p in (extra, scalar)]
    optimizer.add_param_group(
        {"params": [("extra", extra), ("scalar", scalar)], "lr": 0.1, "weight_decay": 0.3}
    )
    adamw = torch.optim.AdamW(plain, lr=0.1, weight_decay=0.3, fused=True)
    for step in range(4):
        backward(model, step)
        for one, other in zip((extra, scalar), plain, strict=True):
            one.grad = torch.full_like(one, 0.5 + step)
            other.grad = one.grad.clone()
        optimizer.step()
        adamw.step()
    assert torch.equal(extra, plain[0])
    assert torch.equal(scalar, plain[1])
    assert set(optimizer.routing) == {"up", "down"}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": -1.0}, "Invalid lr=-1.0"),
        ({"weight_decay": float("nan")}, "Invalid weight_decay=nan"),
        ({"eps": -1e-8}, "Invalid eps=-1e-08"),
        ({"betas": (0.9, 1.0)}, r"Invalid betas=\(0.9, 1.0\)"),
        ({"betas": 0.9}, "Invalid betas=0.9"),
        ({"seed": "x"}, "Invalid seed='x'. Must be an integer."),
        ({"seed": True}, "Invalid seed=True. Must be an integer."),
        ({"maximize": True}, "Invalid options of a group: maximize"),
        ({"amsgrad": True}, "Invalid options of a group: amsgrad"),
        ({"decoupled_weight_decay": False}, "weight decay that is not decoupled"),
        ({"conjugate": True}, "new is a conjugate view, into which no step can write"),
        ({"layer": "new", "complex": True}, "The group of layer 'new' lacks transposed"),
        ({"duplicate": True}, "more than one parameter group"),
    ],
)
def test_wrong_group_is_refused_and_leaves_the_optimizer_as_it_was(
    model, optimizer, group, message
):
    group = dict(group)
    new = nn.Parameter(torch.zeros(2, dtype=torch.complex64 if group.pop("complex", 0) else None))
    if group.pop("conjugate", False):
        new = nn.Parameter(torch.zeros(2, dtype=torch.complex64).conj())
    named = ("new", model.up.weight if group.pop("duplicate", False) else new)
    before = [dict(g) for g in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [named], **group})
    assert [dict(g) for g in optimizer.param_groups] == before
    run(model, optimizer, [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "pnf"}, "Invalid score='pnf'"),
        ({"top_k": 4}, "Invalid top_k=4. Must be from 1 to 3"),
        ({"top_k": 0}, "Invalid top_k=0"),
        ({"ranks": (2, 0)}, r"Invalid ranks=\[2, 0\]"),
        ({"ranks": (2,)}, r"Invalid scalings=.*one number per rank \(1 ranks\)"),
        ({"lora_lr_ratios": (1.0,)}, r"Invalid lora_lr_ratios=\(1.0,\) of layer 'up'"),
        ({"lora_weight_decays": 0.1}, "Invalid lora_weight_decays=0.1"),
        ({"scalings": (1.0, float("nan"))}, "Invalid scalings=nan"),
        ({"weight_rounding": "up"}, "Invalid weight_rounding='up'"),
    ],
)
def test_every_value_of_a_routed_group_is_checked(model, optimizer, change, message):
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        MoLFAdamW([{**groups[0], **change}, *groups[1:]])
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= change
    other = "ranks|scalings" if "ranks" in change or "scalings" in change else message
    with pytest.raises(ValueError, match=other):
        optimizer.load_state_dict(saved)
    assert [dict(group) for group in optimizer.param_groups] == groups
    run(model, optimizer, [0])


def test_two_layers_of_one_name_are_refused(model, optimizer):
    """As those of two models; one would take the other's place in `routing` and `evidence`."""
    other = tiny_optimizer(tiny_model(seed=1))
    group = {k: v for k, v in other.param_groups[0].items() if k != "param_names"}
    group["params"] = list(zip(["a", "b"], group["params"], strict=True))
    with pytest.raises(ValueError, match=r"Layer 'up' is in the optimizer already"):
        optimizer.add_param_group({**group})
    optimizer.add_param_group({**group, "layer": "other.up"})
    run(model, optimizer, [0])
    assert [one["layer"] for one in optimizer.param_groups].count("up") == 1


def test_the_configuration_alone_warns_of_nothing_to_choose(model):
    with pytest.warns(UserWarning, match="top_k=2 is the number of experts"):
        config = MoLFConfig(ranks=(2,), top_k=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = MoLFAdamW.from_model(model, config)
        optimizer.load_state_dict(optimizer.state_dict())


def test_rounding_of_a_group_is_checked_with_its_own_parameters(model, optimizer):
    groups = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="weight_rounding='exact' has nothing to round"):
        MoLFAdamW([{**groups[0], "weight_rounding": "exact"}, *groups[1:]])
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="weight_rounding='exact' is for bfloat16 weights"):
        AdamW([{"params": [half], "weight_rounding": "exact"}])


def test_frozen_weight_beside_a_trained_bias_is_an_error(model, optimizer):
    run(model, optimizer, [0])
    model.up.weight.requires_grad_(False)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="Layer up: the weight got no gradient while the bias"):
        run(model, optimizer, [1])
    assert_same_bits(snapshot(model, optimizer), before)


def test_constructor_needs_a_routed_group(model):
    with pytest.raises(ValueError, match="from_model"):
        MoLFAdamW(model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LambdaLR(o, lambda step: 0.5**step),
        lambda o: CosineAnnealingLR(o, T_max=4),
        lambda o: OneCycleLR(o, max_lr=0.02, total_steps=6),
    ],
    ids=["lambda", "cosine", "one-cycle"],
)
def test_lora_rate_follows_the_schedule(model, make):
    """The same run, with rates set by hand: equal only if every LoRA rate is scaled as well."""
    by_hand = copy.deepcopy(model)
    rates = {"lr": 1e-2, "lora_lr": (3e-2, 5e-3), "top_k": 2, "score": "lora"}
    optimizer = tiny_optimizer(model, **rates)
    scheduler = make(optimizer)
    manual = tiny_optimizer(by_hand, **rates)
    for step in range(4):
        group = optimizer.param_groups[0]
        for own in manual.param_groups:
            own["lr"], own["betas"] = group["lr"], group["betas"]
        factors = [own["lr"] / 1e-2 for own in manual.param_groups]
        before = manual.lora_factors("up")
        run(model, optimizer, [step])
        run(by_hand, manual, [step])
        if step == 0:  # Adam's first step is lr * sign(g) wherever a gradient is not tiny
            for (_, B), (_, old), rate in zip(
                manual.lora_factors("up"), before, (3e-2, 5e-3), strict=True
            ):
                assert (B - old).abs().max() == pytest.approx(rate * factors[0], rel=1e-3)
        scheduler.step()
    assert_same_bits(snapshot(model, optimizer), snapshot(by_hand, manual))


@pytest.mark.parametrize("score", ["epd", "pfn", "full", "lora", "random"])
def test_nothing_moves_at_rate_zero_nor_becomes_nan(model, score):
    optimizer = tiny_optimizer(model, score=score)
    run(model, optimizer, range(3))
    before = snapshot(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(model, optimizer, [3, 4])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = snapshot(model, optimizer)
    still = {k: v for k, v in before.items() if "/" not in k or k.endswith(("lora_A", "lora_B"))}
    assert_same_bits({key: after[key] for key in still}, still)
    assert all(v.isfinite().all() for v in after.values() if isinstance(v, Tensor))


def test_zero_gradients_from_the_start_change_nothing(model, optimizer):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    # All scores are zero: among equals the lowest index wins.
    assert {d.winners for d in optimizer.routing.values()} == {("full",)}


def test_hooks_run_once_per_step(model, optimizer):
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).step()  # patches its own class only
    run(model, optimizer, [0, 1])
    assert calls == ["before", "after"] * 2


def test_zero_grad(model, optimizer):
    backward(model, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_random_score_is_seeded_and_even():
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(6)])
    seen = []
    for seed in (0, 0, 1):
        optimizer = tiny_optimizer(model, score="random", seed=seed)
        picks = []
        for step in range(30):
            feed(model, step)
            optimizer.step()
            picks += [decision.winners[0] for decision in optimizer.routing.values()]
        seen.append(picks)
    assert seen[0] == seen[1] != seen[2]
    for expert in ("full", "lora0_r2", "lora1_r3"):
        assert 35 <= seen[0].count(expert) <= 85  # of 180; five standard deviations


def test_repr_is_one_line_and_survives_a_copy(optimizer):
    text = repr(optimizer)
    assert "2 routed layers" in text
    assert "\n" not in text
    assert repr(copy.deepcopy(optimizer)) == text


def test_sparse_gradients_are_refused_before_anything_changes():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3, sparse=True), "fc": nn.Linear(3, 3)})
    optimizer = tiny_optimizer(model)
    model["fc"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"embed.weight is sparse"):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1.0}, "Invalid lr=-1.0. Must be a finite number, at least 0."),
        ({"lr": "fast"}, "Invalid lr='fast'"),
        ({"lora_lr": -1.0}, "Invalid lora_lr=-1.0"),
        ({"lora_lr": "x"}, "Invalid lora_lr='x'"),
        ({"lora_lr": (1e-3,)}, r"Invalid lora_lr=\[0.001\]. Must be one number, or one per rank"),
        ({"lr": 0.0, "lora_lr": 1e-3}, r"Invalid lora_lr=\[0.001, 0.001\] with lr=0"),
        ({"weight_decay": float("inf")}, "Invalid weight_decay=inf"),
        ({"lora_weight_decay": -0.1}, "Invalid lora_weight_decay=-0.1"),
        ({"betas": (1.0, 0.9)}, r"Invalid betas=\(1.0, 0.9\). Must be two numbers"),
        ({"betas": 0.9}, "Invalid betas=0.9"),
        ({"eps": float("nan")}, "Invalid eps=nan"),
        ({"eps": 0.0}, "Invalid eps=0 of layer 'up': a factor without a gradient so far would"),
        ({"nonfinite": "ignore"}, "Invalid nonfinite='ignore'. Must be 'raise' or 'skip'."),
    ],
)
def test_wrong_hyper_parameters_are_named(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(2, 3)), **kwargs)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (nn.Linear(2, 2).parameters(), None, "Invalid model of type generator. Must be Module."),
        (nn.Linear(2, 2), {"ranks": 4}, "Invalid config of type dict. Must be MoLFConfig."),
        (nn.Linear(2, 2), "epd", "Invalid config of type str. Must be MoLFConfig."),
    ],
)
def test_model_and_config_of_another_kind_are_named(model, config, message):
    with pytest.raises(TypeError) as raised:
        MoLFAdamW.from_model(model, config)
    assert str(raised.value) == message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_a_later_step_without_a_gradient_is_warned_of_once(form, in_backward):
    model, optimizer = in_form(form, tiny_model(), optimizer_in_backward=in_backward)
    run(model, optimizer, [0, 1])
    before = snapshot(model, optimizer)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="No parameter has a gradient in this step") as caught:
        optimizer.step()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)


# -- groups that are added ------------------------------------------------------------------------


def extended(form: str, when: str = "later", **options):
    """A pair, and a module without names whose parameters are added later or at the beginning."""
    torch.manual_seed(3)
    extra = nn.Linear(6, 6)
    model, optimizer = in_form(form, tiny_model(), **{"lr": 1e-2, **options})
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.1})
    return model, extra, optimizer


def train_extended(model, extra, optimizer, seeds):
    for seed in seeds:
        backward(model, seed)
        feed(extra, seed)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"optimizer_in_backward": True}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parameters_without_names_are_added_and_take_adamw_steps(form, options):
    model, extra, optimizer = extended(form, **options)
    twin = copy.deepcopy(extra)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    group = optimizer.param_groups[-1]
    adamw.param_groups[0]["weight_decay"] = group["weight_decay"]
    assert group["layer"] is None
    number = len(optimizer.param_groups) - 1
    assert group["param_names"] == [f"parameter [{i}] of group {number}" for i in range(2)]
    for seed in range(3):
        backward(model, seed)
        feed(extra, seed)
        feed(twin, seed)
        optimizer.step()
        adamw.step()
    for one, other in zip(extra.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_state_with_added_parameters_loads_in_the_same_order_of_construction(form, tmp_path):
    model, extra, optimizer = extended(form)
    train_extended(model, extra, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin, its_extra, other = extended(form)
    twin.load_state_dict(model.state_dict())
    its_extra.load_state_dict(extra.state_dict())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train_extended(model, extra, optimizer, [2])
    train_extended(twin, its_extra, other, [2])
    assert_same_bits(snapshot(twin, other), snapshot(model, optimizer))
    assert_same_bits(snapshot(its_extra, other), snapshot(extra, optimizer))
    _, before = in_form(form, tiny_model())
    count = len(before.param_groups)
    with pytest.raises(ValueError, match=f"it has {count} parameter groups, this optimizer has"):
        other.load_state_dict(before.state_dict())


@pytest.mark.parametrize("first", ["named", "nameless"])
def test_groups_with_and_without_names_go_together(first):
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": one.parameters()}, {"params": two.named_parameters()}]
    optimizer = AdamW(groups if first == "nameless" else groups[::-1])
    names = [group["param_names"] for group in optimizer.param_groups]
    place = 0 if first == "nameless" else 1
    assert names[place] == [f"parameter [{i}] of group {place}" for i in range(2)]
    assert names[1 - place] == ["weight", "bias"]


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "generator", "dict values"])
def test_parameters_come_in_any_collection(model, optimizer, kind):
    one = nn.Parameter(torch.zeros(2))
    given = {
        "tensor": one,
        "list": [one],
        "tuple": (one,),
        "generator": (each for each in [one]),
        "dict values": {"one": one}.values(),
    }[kind]
    optimizer.add_param_group({"params": given})
    assert optimizer.param_groups[-1]["params"] == [one]
    assert len(optimizer.param_groups[-1]["param_names"]) == 1


def test_group_that_is_refused_leaves_no_names():
    optimizer = AdamW([nn.Parameter(torch.zeros(2))])
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="Invalid lr=-1"):
        optimizer.add_param_group({"params": [("two", nn.Parameter(torch.zeros(2)))], "lr": -1.0})
    with pytest.raises(ValueError, match="non-leaf"):
        optimizer.add_param_group({"params": [("two", nn.Parameter(torch.zeros(2)) * 2)]})
    assert [dict(group) for group in optimizer.param_groups] == before


def test_unfreezing_as_lightnings_callback_does():
    """`BaseFinetuning`: a frozen backbone's parameters are added once they are to be trained."""
    backbone, head = nn.Linear(6, 6), nn.Linear(6, 3)
    model = nn.Sequential(backbone, head)
    backbone.requires_grad_(False)
    optimizer = MoLFAdamW.from_model(model, MoLFConfig(ranks=(2,)), lr=1e-2)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    backbone.requires_grad_(True)
    new = [p for p in backbone.parameters() if p not in held]
    optimizer.add_param_group({"params": new, "lr": optimizer.param_groups[0]["lr"] / 10.0})
    before = [p.detach().clone() for p in backbone.parameters()]
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    assert set(optimizer.routing) == {"1"}
    for parameter, old in zip(backbone.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
