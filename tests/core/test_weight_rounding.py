"""bfloat16 weights: exact, stochastic and nearest; what is refused; what changes from outside."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import molf
from core_helpers import (
    Conv1D,
    assert_same_bits,
    feed,
    run,
    snapshot,
    tiny_model,
    tiny_optimizer,
)
from molf import AdamW
from molf.core.arithmetic.blocks import Blocks
from molf.core.execute.eager import Eager
from optimizer_forms import build

BF16 = torch.bfloat16


class Layers(nn.Module):
    """Linear layers in both layouts, one larger than a block, an embedding and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 24)
        self.first = nn.Linear(24, 40)
        self.turned = Conv1D(24, 40)
        self.large = nn.Linear(150, 300, bias=False)
        self.norm = nn.LayerNorm(24)


made = partial(build, model=lambda: Layers().to(BF16), lr=2e-5, lora_lr=None, weight_decay=0.1)


def values_of(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """What the parameters stand for, by name."""
    exact = optimizer.float32_weights()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return {name: exact.get(p, p).detach().clone() for name, p in trained}


def feed_bfloat16(model: nn.Module, seed: int) -> None:
    """Gradients that both precisions can hold, in the sizes of a training."""
    feed(model, seed, scale=1e-2)
    for parameter in model.parameters():
        parameter.grad = parameter.grad.to(BF16).to(parameter.dtype)


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_nearest_is_not_the_float32_run(form):
    model, optimizer = made(form, "nearest")
    master, reference = made(form)
    start = values_of(master, reference)
    for step in range(30):
        for each in (model, master):
            feed_bfloat16(each, step)
        optimizer.step()
        reference.step()
    got, expected = values_of(model, optimizer), values_of(master, reference)
    stuck = (got["large.weight"] == start["large.weight"]).float().mean()
    assert stuck > 0.3 > (expected["large.weight"] == start["large.weight"]).float().mean()


def test_updates_below_half_a_unit_add_up_by_hand():
    """At weight 1 a bfloat16 moves by 2^-8 downwards; each AdamW step here is 2^-11."""
    weights = {}
    for rounding in ("exact", "nearest"):
        weight = nn.Parameter(torch.ones(3, dtype=BF16))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = AdamW(
                [weight], lr=2.0**-11, weight_decay=0.0, eps=0.0, weight_rounding=rounding
            )
        seen = []
        for _ in range(8):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            seen.append(weight[0].item())
        weights[rounding] = seen
    assert weights["nearest"] == [1.0] * 8
    # Exactly half a unit is a tie, which goes away from zero: the next one falls.
    assert weights["exact"][:4] == [1.0, 1.0, 1.0, 1.0]
    assert weights["exact"][4:] == [1 - 2.0**-8] * 4


# -- stochastic rounding --------------------------------------------------------------------------


def one_step(names: list[str], seed: int = 0, before: int = 0, block: int | None = None) -> Tensor:
    """Where one stochastic step takes equal weights: [parameters, elements]."""
    parameters = [nn.Parameter(torch.full((64, 64), 0.37, dtype=BF16)) for _ in names]
    optimizer = AdamW(
        list(zip(names, parameters, strict=True)), lr=1e-4, seed=seed, weight_rounding="stochastic"
    )
    if block:
        optimizer.executor = Eager(Blocks(cpu_elements=block))
    for step in range(before + 1):
        for parameter in parameters:
            if step < before:
                optimizer.param_groups[0]["lr"] = 0.0
            else:
                optimizer.param_groups[0]["lr"] = 1e-4
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return torch.stack([p.detach().flatten() for p in parameters])


def test_stochastic_draws_depend_on_seed_name_and_step_alone():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = one_step(["a", "b"])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(one_step(["a", "b"]), first)
    assert torch.equal(one_step(["b", "a"]), first.flip(0))  # not on the order
    assert torch.equal(one_step(["a"], block=128), first[:1])  # nor on blocks
    others = (first[1:], one_step(["a"], seed=1), one_step(["a"], before=1))
    for other in others:
        share = (other != first[0]).float().mean().item()
        p = (first[0] != first[0].max()).float().mean().item()
        assert abs(share - 2 * p * (1 - p)) < 0.04  # as of independent draws
        assert 0.02 < p < 0.98


def test_stochastic_rounding_is_unbiased_end_to_end():
    """The mean movement is that of float32 weights, where nearest does not move at all."""
    ends = {}
    for dtype, rounding in ((torch.float32, None), (BF16, "stochastic"), (BF16, "nearest")):
        weight = nn.Parameter(torch.full((128, 128), 0.7, dtype=BF16).to(dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = AdamW([weight], lr=1e-5, weight_decay=0.1, weight_rounding=rounding)
        for _ in range(50):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[rounding] = weight.detach().double()
    start = torch.tensor(0.7).to(BF16).double()
    expected = ends[None].mean() - start
    moved = ends["stochastic"] - start
    sigma = moved.std() / math.sqrt(moved.numel())
    assert abs(moved.mean() - expected) < 4 * sigma
    assert sigma < 0.05 * abs(expected)
    assert torch.equal(ends["nearest"], start.expand_as(moved))


# -- changed from outside -------------------------------------------------------------------------


def stepped(steps: int = 3):
    model, optimizer = made("folded", "exact", lr=1e-3)
    for step in range(steps):
        feed_bfloat16(model, step)
        optimizer.step()
    return model, optimizer


def test_weights_swapped_out_and_in_again_lose_nothing():
    model, optimizer = stepped()
    twin, reference = stepped()
    own = copy.deepcopy(model.state_dict())
    average = {name: value * 0.5 for name, value in own.items()}
    model.load_state_dict(average)  # as an evaluation of averaged weights does
    model.load_state_dict(own)
    for each, its in ((model, optimizer), (twin, reference)):
        feed_bfloat16(each, 9)
        its.step()
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, reference))


@pytest.mark.parametrize("reset", [False, True])
def test_weights_replaced_for_good_count(reset):
    """Within half a unit in the last place; exactly, once the lower halves are reset."""
    model, optimizer = stepped()
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(300, 150, generator=generator).to(BF16)
    new[:100] = 0.0  # pruned: a lower half below zero is nothing
    new[100:110] = -0.0
    with torch.no_grad():
        model.large.weight.copy_(new)
    assert (optimizer.state[model.large.weight]["low"][:100] < 0).any()
    if reset:
        optimizer.reset_low_halves()
    values = optimizer.float32_weights()[model.large.weight]
    if reset:
        assert torch.equal(values, new.float())
    unit = torch.exp2(torch.floor(torch.log2(new.float().abs().clamp(min=2.0**-126))) - 7)
    assert ((values - new.float()).abs() <= unit / 2).all()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    feed_bfloat16(model, 9)
    optimizer.step()
    assert torch.equal(optimizer.float32_weights()[model.large.weight], values)
    assert torch.equal(model.large.weight[:100], new[:100])


def test_parameters_become_float32_for_good():
    model, optimizer = stepped()
    expected = optimizer.float32_weights()
    moved = [parameter for parameter in expected if "low" in optimizer.state[parameter]]
    assert moved
    optimizer.restore_float32()
    for parameter in moved:
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[parameter])
        assert "low" not in optimizer.state[parameter]
    assert model.large.weight in expected  # the same parameter


def test_factors_set_from_outside_are_kept_in_full():
    _, optimizer = made("frozen", "exact", target_modules=["first", "large"])
    factors = [(A + 0.1234567, B + 0.7654321) for A, B in optimizer.lora_factors("first")]
    optimizer.set_lora_factors("first", factors)
    for given, got in zip(factors, optimizer.lora_factors("first"), strict=True):
        for one, other in zip(given, got, strict=True):
            assert other.dtype == torch.float32
            torch.testing.assert_close(other, one, rtol=1e-6, atol=0.0)


def test_state_without_low_halves_goes_on_from_the_weights():
    """Checkpoints of before, or of another rounding."""
    model, optimizer = stepped()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry.pop("low")
    twin, resumed = made("folded", "exact", lr=1e-3)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    feed_bfloat16(twin, 9)
    resumed.step()
    assert all("low" in resumed.state[p] for p in twin.parameters())


# -- what cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_optimizer, AdamW])
@pytest.mark.parametrize(
    ("dtype", "rounding", "message"),
    [
        (torch.float32, "exact", "nothing to round: the trained weights are torch.float32. Load"),
        (torch.float32, "nearest", "nothing to round"),
        (torch.float64, "stochastic", "nothing to round: the trained weights are torch.float64"),
        (torch.float16, "exact", "is for bfloat16 weights, and some are torch.float16"),
        (torch.float16, "stochastic", "is for bfloat16 weights"),
        (BF16, "kahan", "Must be 'exact', 'stochastic', 'nearest' or None"),
    ],
)
def test_impossible_roundings_are_refused_at_construction(make, dtype, rounding, message):
    model = tiny_model(dtype)
    given = model if make is tiny_optimizer else model.parameters()
    with pytest.raises(ValueError, match=message):
        make(given, weight_rounding=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.int8])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer_in_backward": True}, {"weight_rounding": "exact"}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_frozen_parameters_may_have_any_dtype(recwarn, dtype, options):
    """`AdamW(model.parameters())` of a model with a quantised or float16 base."""
    model = nn.Linear(8, 8, dtype=BF16)
    model.base = nn.Parameter(torch.zeros(64, 64, dtype=dtype), requires_grad=False)
    optimizer = AdamW(model.parameters(), **options)
    model(torch.ones(1, 8, dtype=BF16)).sum().backward()
    optimizer.step()
    assert not recwarn.list
    assert model.base not in optimizer.state
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_rounding"] == options.get("weight_rounding")


def test_float32_weights_among_bfloat16_ones_stay_as_they_are():
    model = tiny_model(BF16)
    model.norm.float()
    optimizer = tiny_optimizer(model, weight_rounding="exact")
    feed(model, 0)
    optimizer.step()
    with_low = {n for n, p in model.named_parameters() if "low" in optimizer.state[p]}
    assert with_low == {n for n, _ in model.named_parameters() if "norm" not in n}


def test_trainers_take_the_options():
    _, options = molf.trainer_optimizer(
        lr=1e-3, weight_rounding="stochastic", state_dtype="float32"
    )
    factory, _ = molf.trainer_optimizer(lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = factory()(tiny_model(BF16), **options)
    assert {group["weight_rounding"] for group in optimizer.param_groups} == {"stochastic"}


# -- the baseline ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, False)])
def test_adamw_is_torchs(dtype, fused):
    model, twin = tiny_model(dtype), tiny_model(dtype)
    own = AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW(
        twin.parameters(), lr=1e-2, weight_decay=0.1, foreach=False, fused=fused
    )
    run(model, own, range(10))
    run(twin, plain, range(10))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
