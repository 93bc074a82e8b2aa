"""Rates and decays of every kind of number: a step takes them, and they are saved and loaded."""

from __future__ import annotations

import copy
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import (
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from core_helpers import assert_same_bits, backward, run, snapshot, tiny_model, tiny_optimizer
from molf import AdamW, MoLFAdamW, MoLFConfig
from optimizer_forms import FORMS, in_form

RATES = {
    "numpy": np.float32(0.03125),
    "numpy-float16": np.float16(0.03125),
    "numpy-array": np.array([0.03125]),
    "tensor": torch.tensor(0.03125),
    "tensor-1": torch.tensor([0.03125]),
    "tensor-float64": torch.tensor(0.03125, dtype=torch.float64),
    "tensor-bfloat16": torch.tensor(0.03125, dtype=torch.bfloat16),
    "tensor-grad": torch.tensor(0.03125, requires_grad=True),
    "fraction": Fraction(1, 32),
}


def pair_of(form: str, **options):
    return in_form(form, tiny_model(), **{"lr": 1e-2, **options})


def resumed(form: str, optimizer: AdamW, path, **options):
    """A fresh pair with the state that `optimizer` has on disk."""
    torch.save(optimizer.state_dict(), path / "state.pt")
    twin, other = pair_of(form, **options)
    other.load_state_dict(torch.load(path / "state.pt", weights_only=True))
    return twin, other


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("form", ["folded", "frozen", "fft"])
def test_a_rate_of_any_kind_is_taken_saved_and_loaded(form, rate, tmp_path):
    plain, plain_optimizer = pair_of(form, lr=0.03125)
    model, optimizer = pair_of(form, lr=rate)
    run(plain, plain_optimizer, range(2))
    run(model, optimizer, range(2))
    assert_same_bits(snapshot(model, optimizer), snapshot(plain, plain_optimizer))

    twin, other = resumed(form, optimizer, tmp_path)
    twin.load_state_dict(model.state_dict())
    assert float(other.param_groups[0]["lr"]) == 0.03125
    assert isinstance(other.param_groups[0]["lr"], (float, Tensor))
    run(model, optimizer, [2])
    run(twin, other, [2])
    assert_same_bits(snapshot(twin, other), snapshot(model, optimizer))


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_schedules_write_are_saved_and_loaded(form, tmp_path):
    values = {
        "lr": np.float32(-0.01),
        "weight_decay": Fraction(-1, 3),
        "eps": torch.tensor([1e-7]),
        "betas": (np.float64(0.8), torch.tensor(0.99)),
        "initial_lr": np.float32(0.5),
        "max_lr": np.int64(1),
    }
    model, optimizer = pair_of(form)
    plain, plain_optimizer = pair_of(form)
    for group, own in zip(optimizer.param_groups, plain_optimizer.param_groups, strict=True):
        group.update(copy.deepcopy(values))
        own.update({key: float(x) for key, x in values.items() if key != "betas"})
        own["betas"] = (0.8, float(values["betas"][1]))
        if group["layer"] is not None:
            group["bias_weight_decay"] = np.float32(own["bias_weight_decay"])
            for name in ("lora_lr_ratios", "lora_weight_decays"):
                group[name] = [np.float32(value) for value in own[name]]
                own[name] = tuple(map(float, group[name]))
    for each, own in ((model, optimizer), (plain, plain_optimizer)):
        run(each, own, range(2))
    assert_same_bits(snapshot(model, optimizer), snapshot(plain, plain_optimizer))
    twin, other = resumed(form, optimizer, tmp_path)
    twin.load_state_dict(model.state_dict())
    run(twin, other, [2])
    run(plain, plain_optimizer, [2])
    assert_same_bits(snapshot(twin, other), snapshot(plain, plain_optimizer))


SCHEDULES = {
    "numpy": lambda o: LambdaLR(o, lambda epoch: np.float32(0.9) ** epoch),
    "below-zero": lambda o: LambdaLR(o, lambda epoch: 1 - epoch),
    "exponential": lambda o: ExponentialLR(o, 0.5),
    "one-cycle": lambda o: OneCycleLR(o, max_lr=np.float64(0.02), total_steps=9),
    "sequential": lambda o: SequentialLR(
        o, [LambdaLR(o, lambda e: (e + 1) / 4), ExponentialLR(o, 0.5)], [2]
    ),
}


@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_resume(make, is_tensor, tmp_path):
    rate = torch.tensor(0.01) if is_tensor else 0.01
    model, optimizer = pair_of("folded", lr=rate)
    schedule = make(optimizer)
    for step in range(4):
        run(model, optimizer, [step])
        schedule.step()
    twin, other = resumed("folded", optimizer, tmp_path)
    twin.load_state_dict(model.state_dict())
    for own, group in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert float(own["lr"]) == float(group["lr"])
    run(model, optimizer, [4])
    run(twin, other, [4])
    assert_same_bits(snapshot(twin, other), snapshot(model, optimizer))


@pytest.mark.parametrize("build", ["from_model", "groups", "adamw"])
def test_a_tensor_stays_one_of_each_groups_own(build):
    """ReduceLROnPlateau multiplies the rate of one group after the other."""
    model = tiny_model()
    rate = torch.tensor(0.5)
    if build == "adamw":
        halves = [[("up", model.up.weight)], [("down", model.down.weight)]]
        optimizer = AdamW([{"params": half} for half in halves], lr=rate)
    else:
        optimizer = tiny_optimizer(model, lr=rate)
    if build == "groups":
        groups = [dict(group) for group in optimizer.param_groups]
        optimizer = MoLFAdamW([{**group, "lr": rate} for group in groups], lr=rate)
    assert all(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    before = [group["lr"] for group in optimizer.param_groups]
    schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(2):
        schedule.step(1.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25] * len(before)
    assert all(g["lr"] is old for g, old in zip(optimizer.param_groups, before, strict=True))


def test_tensors_are_separate_after_loading_too():
    rate = torch.tensor(0.5)
    model = tiny_model()
    optimizer, other = tiny_optimizer(model), tiny_optimizer(tiny_model())
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = rate
    other.load_state_dict(state)
    rates = [group["lr"] for group in other.param_groups]
    assert len({id(each) for each in rates}) == len(rates)
    assert all(isinstance(each, Tensor) for each in rates)


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_a_tensor_rate_in_steps_in_the_backward_pass(form):
    model, optimizer = pair_of(form, lr=torch.tensor(0.03125), optimizer_in_backward=True)
    twin, plain = pair_of(form, lr=0.03125, optimizer_in_backward=True)
    for each, own in ((model, optimizer), (twin, plain)):
        run(each, own, range(2))
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, plain))


@pytest.mark.parametrize("flatten", [False, True])
def test_a_tensor_rate_in_a_distributed_checkpoint(flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = pair_of("folded", lr=torch.tensor(0.03125))
    optimizer.param_groups[0]["weight_decay"] = np.float32(0.25)
    run(model, optimizer, range(2))
    saved = {"optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path / "c", no_dist=True)
    twin, other = pair_of("folded", lr=torch.tensor(1.0))
    twin.load_state_dict(model.state_dict())
    target = {"optim": get_optimizer_state_dict(twin, other, options=options)}
    dcp.load(target, checkpoint_id=tmp_path / "c", no_dist=True)
    set_optimizer_state_dict(twin, other, target["optim"], options=options)
    assert float(other.param_groups[0]["lr"]) == 0.03125
    assert float(other.param_groups[0]["weight_decay"]) == 0.25
    run(model, optimizer, [2])
    run(twin, other, [2])
    assert_same_bits(snapshot(twin, other), snapshot(model, optimizer))


def test_torchs_state_with_tensors_and_numpys_numbers_loads():
    model, twin = tiny_model(), tiny_model()
    theirs = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), weight_decay=0.1)
    LambdaLR(theirs, lambda epoch: np.float32(1) - epoch)
    run(model, theirs, range(2))
    theirs.param_groups[0]["weight_decay"] = np.float64(0.1)
    ours = AdamW(twin.parameters())
    twin.load_state_dict(model.state_dict())
    ours.load_state_dict(theirs.state_dict())
    run(twin, ours, [2])
    assert ours.state_dict()["param_groups"][0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", float("nan")),
        ("lr", torch.tensor(float("inf"))),
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", torch.tensor(0.1, device="meta")),
        ("lr", True),
        ("lr", np.bool_(True)),
        ("lr", "fast"),
        ("lr", None),
        ("lr", 10**400),
        ("lr", Fraction(10**400)),
        ("lr", torch.tensor(1j)),
        ("eps", np.float32("nan")),
        ("weight_decay", torch.tensor([])),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("betas", (0.9, torch.tensor([0.9, 0.9]))),
        ("betas", (float("nan"), 0.9)),
        ("lora_weight_decays", (0.1, "x")),
        ("lora_weight_decays", np.array([0.1, 0.1])),
    ],
)
def test_what_no_step_can_use_is_refused_by_step_and_load(name, value):
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    run(model, optimizer, [0])
    before = snapshot(model, optimizer)
    state = optimizer.state_dict()
    optimizer.param_groups[1][name] = value
    backward(model, 1)
    with pytest.raises(ValueError, match=f"Invalid {name}=") as raised:
        optimizer.step()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200
    assert_same_bits(snapshot(model, optimizer), before)
    state["param_groups"][1][name] = value
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        tiny_optimizer(tiny_model()).load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", torch.tensor(-1.0)),
        ("lr", np.float32(-1)),
        ("lr", torch.tensor([1.0, 2.0])),
        ("eps", Fraction(-1, 2)),
        ("weight_decay", np.float32("inf")),
        ("betas", (np.float32(1), 0.9)),
        ("lora_lr", torch.tensor(-1.0)),
        ("lora_lr", Decimal(-1)),
    ],
)
def test_out_of_range_is_refused_at_construction_whatever_it_is_kept_as(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}="):
        MoLFAdamW.from_model(tiny_model(), MoLFConfig(ranks=(2, 3)), **{name: value})


def test_rates_of_experts_may_be_tensors_or_arrays():
    plain = tiny_optimizer(tiny_model(), lr=0.5, lora_lr=(0.25, 1.0), lora_weight_decay=0.5)
    for rates in (torch.tensor([0.25, 1.0]), np.array([0.25, 1.0]), (np.float32(0.25), 1)):
        made = tiny_optimizer(
            tiny_model(), lr=torch.tensor(0.5), lora_lr=rates, lora_weight_decay=np.float32(0.5)
        )
        for key in ("lora_lr_ratios", "lora_weight_decays"):
            assert made.param_groups[0][key] == plain.param_groups[0][key]
    assert "lr=0.5, lora_lr=[0.25, 1.0]" in repr(made)


def test_a_scalar_parameter_with_a_tensor_rate():
    one = nn.Parameter(torch.tensor(2.0))
    optimizer = AdamW([one], lr=torch.tensor(0.5), weight_decay=torch.tensor(0.0))
    one.grad = torch.tensor(1.0)
    optimizer.step()
    assert one.item() == pytest.approx(1.5)
