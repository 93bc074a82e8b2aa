"""A gradient with infinity or NaN is found before any weight, moment or counter is written."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import core_helpers
from core_helpers import (
    as_on_an_accelerator,
    assert_same_bits,
    backward,
    feed,
    run,
    snapshot,
    tiny_model,
)
from molf.core.step.guard import NonFiniteError

NAN, INF = float("nan"), float("inf")
PLACES = ["up.weight", "up.bias", "embed.weight", "down.weight", "lm_head.weight", "norm.bias"]


_host_can_read = True


@pytest.fixture(params=[True, False], ids=["host", "accelerator"], autouse=True)
def host_can_read(request, monkeypatch):
    """A CPU is asked at once whether a gradient is bad; an accelerator after its moments."""
    monkeypatch.setitem(globals(), "_host_can_read", request.param)


def tiny_optimizer(model, **options):
    optimizer = core_helpers.tiny_optimizer(model, **options)
    return optimizer if _host_can_read else as_on_an_accelerator(optimizer)


def spoil(model, place: str, *values: float) -> None:
    """Put the values at the end of a gradient."""
    model.get_parameter(place).grad.view(-1)[-len(values) :] = torch.tensor(values)


def bad_step(model, optimizer, place: str, *values: float) -> None:
    backward(model, seed=99)
    spoil(model, place, *values)
    optimizer.step()


@pytest.mark.parametrize("score", ["epd", "pfn", "random"])
@pytest.mark.parametrize("first", [False, True])
def test_skipped_batch_might_as_well_not_have_been(score, first):
    model, clean = tiny_model(), tiny_model()
    optimizer = tiny_optimizer(model, score=score, nonfinite="skip")
    reference = tiny_optimizer(clean, score=score)
    good = range(4)
    run(model, optimizer, good[: 0 if first else 2])
    with pytest.warns(UserWarning, match="Step skipped"):
        bad_step(model, optimizer, "down.weight", NAN)
    with warnings.catch_warnings():  # a long run would be drowned in them
        warnings.simplefilter("error")
        bad_step(model, optimizer, "down.weight", NAN)
    assert optimizer.skipped_steps == 2
    assert optimizer.routing == {}
    run(model, optimizer, good[0 if first else 2 :])
    run(clean, reference, good)
    assert optimizer.routing == reference.routing
    assert_same_bits(snapshot(model, optimizer), snapshot(clean, reference))


def test_many_bad_gradients_are_counted():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    backward(model, 0)
    for place in PLACES:
        spoil(model, place, NAN)
    with pytest.raises(RuntimeError, match=r"up.weight, up.bias, down.weight and 3 more"):
        optimizer.step()


def test_bad_gradient_outside_the_optimizer_does_not_matter():
    model = tiny_model()
    model.embed.weight.requires_grad_(False)
    optimizer = tiny_optimizer(model)
    backward(model, 0)
    model.embed.weight.grad = torch.full_like(model.embed.weight, NAN)
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_large_finite_gradients_of_low_precision_weights_pass():
    """Their sum leaves float16's range; it is formed in float32."""
    model = torch.nn.Linear(64, 64, bias=False).half()
    optimizer = tiny_optimizer(model)
    model.weight.grad = torch.full_like(model.weight, 1000.0)
    optimizer.step()
    assert model.weight.isfinite().all()
    assert optimizer.routing


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("wrong", ["A", "B", "their squares", "NaN"])
def test_overflowing_gradients_of_factors_leave_every_bit(nonfinite, wrong):
    """G is finite and `s B^T G` or `s G A^T` is not, or its square is not."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16), "b": torch.nn.Linear(16, 16)})
    optimizer = tiny_optimizer(model, nonfinite=nonfinite)
    feed(model, 0)
    optimizer.step()
    factors = optimizer.lora_factors("b")
    large = {"A": (1e30, 0), "B": (1, 1e30), "their squares": (1, 1e10), "NaN": (NAN, 0)}[wrong]
    optimizer.set_lora_factors("b", [(A * large[0], B + large[1]) for A, B in factors])
    before = snapshot(model, optimizer)
    feed(model, 1, scale=1e10)
    match = r"Gradient too large in b\.weight \(finite, but .* LoRA factors would overflow\)"
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match=match):
            optimizer.step()
    else:
        with pytest.warns(UserWarning, match=match):
            optimizer.step()
        assert optimizer.skipped_steps == 1
    assert_same_bits(snapshot(model, optimizer), before)
    optimizer.set_lora_factors("b", factors)
    feed(model, 2)
    optimizer.step()
    assert optimizer.routing.keys() == {"a", "b"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("value", "passes"), [(1e16, True), (1e20, False), (1e37, False)])
def test_gradients_whose_squares_overflow_are_named_as_that(value, passes, dtype):
    """A second moment of infinity would never come back."""
    model = tiny_model(dtype)
    optimizer = tiny_optimizer(model)
    run(model, optimizer, [0])
    before = snapshot(model, optimizer)
    backward(model, 1)
    model.embed.weight.grad.fill_(value)
    model.norm.bias.grad.fill_(value)
    if passes:
        optimizer.step()
        assert all(
            x.isfinite().all() for x in snapshot(model, optimizer).values() if torch.is_tensor(x)
        )
    else:
        with pytest.raises(RuntimeError, match=r"Gradient too large in embed.weight, norm.bias \("):
            optimizer.step()
        assert_same_bits(snapshot(model, optimizer), before)


def test_moments_that_are_not_finite_are_reported_before_any_weight_moves():
    """Whatever has written them; no step has."""
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    run(model, optimizer, [0])
    optimizer.state[model.up.weight]["lora_A_exp_avg"][0, 0] = INF
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, 1)
    with pytest.raises(RuntimeError, match=r"Scores of layer up are not finite.*Its moments are"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 1.0, r"Non-finite loss \(nan\)"),
        (INF, None, r"Non-finite loss \(inf\)"),
        (1.0, INF, r"Non-finite gradient norm \(inf\)"),
        (NAN, NAN, r"Non-finite loss \(nan\)"),
    ],
)
def test_a_loss_that_is_not_finite_forbids_the_step(nonfinite, loss, norm, reason):
    """All gradients may be finite beside it."""
    model = tiny_model()
    optimizer = tiny_optimizer(model, nonfinite=nonfinite)
    run(model, optimizer, [0])
    before = snapshot(model, optimizer)
    backward(model, 1)
    given = () if norm is None else (torch.tensor(norm),)
    optimizer.require_finite(torch.tensor(loss), *given)
    if nonfinite == "raise":
        with pytest.raises(NonFiniteError, match=reason):
            optimizer.step()
    else:
        reasons = []
        optimizer.on_skipped = reasons.append
        optimizer.step()
        assert len(reasons) == optimizer.skipped_steps == 1
        assert re.fullmatch(reason, reasons[0])
    assert_same_bits(snapshot(model, optimizer), before)
    optimizer.step()  # it holds for one step
    optimizer.require_finite(torch.tensor(1.0), torch.tensor(2.0))
    run(model, optimizer, [2])
    assert optimizer.routing


def test_gradients_may_be_reset_between_the_loss_and_its_backward_pass():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    optimizer.require_finite(torch.tensor(NAN))
    optimizer.zero_grad()
    backward(model, 0)
    with pytest.raises(NonFiniteError, match=r"Non-finite loss \(nan\)"):
        optimizer.step()


def test_the_gradient_is_named_rather_than_the_norm():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    backward(model, 0)
    spoil(model, "up.weight", NAN)
    optimizer.require_finite(torch.tensor(1.0), torch.tensor(NAN))
    with pytest.raises(NonFiniteError, match=r"Non-finite gradient in up\.weight;"):
        optimizer.step()


def test_a_loss_is_required_before_layers_move():
    optimizer = tiny_optimizer(tiny_model(), optimizer_in_backward=True)
    with pytest.raises(ValueError, match=r"Look at the loss before loss.backward"):
        optimizer.require_finite(torch.tensor(NAN))
