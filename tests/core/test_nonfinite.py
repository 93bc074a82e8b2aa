"""A gradient with infinity or NaN is found before any weight, moment or counter is written."""

from __future__ import annotations

import pytest
import torch
from core_helpers import assert_same_bits, backward, run, snapshot, tiny_model, tiny_optimizer

from molf.core import guard

NAN, INF = float("nan"), float("inf")
PLACES = ["up.weight", "up.bias", "embed.weight", "down.weight", "lm_head.weight", "norm.bias"]


@pytest.fixture(params=["host", "accelerator"], autouse=True)
def knows(request, monkeypatch):
    """Who knows first that a gradient is bad: a CPU is asked at once, an accelerator is not."""
    monkeypatch.setattr(guard, "reads_for_nothing", lambda device: request.param == "host")


def spoil(model, place: str, *values: float) -> None:
    """Put the values at the end of a gradient."""
    model.get_parameter(place).grad.view(-1)[-len(values) :] = torch.tensor(values)


def bad_step(model, optimizer, place: str, *values: float) -> None:
    backward(model, seed=99)
    spoil(model, place, *values)
    optimizer.step()


@pytest.mark.parametrize("values", [(NAN,), (INF,), (-INF,), (INF, -INF)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_raises_and_names_it_and_leaves_every_bit(place, values):
    model = tiny_model()
    optimizer = tiny_optimizer(model, top_k=2)
    run(model, optimizer, range(2))
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match=f"Non-finite gradient in {place}; no weight"):
        bad_step(model, optimizer, place, *values)
    assert_same_bits(snapshot(model, optimizer), before)
    assert optimizer.skipped_steps == 0
    run(model, optimizer, [2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("score", ["epd", "pfn", "random"])
@pytest.mark.parametrize("first", [False, True])
def test_skipped_batch_might_as_well_not_have_been(dtype, score, first):
    model, clean = tiny_model(dtype), tiny_model(dtype)
    optimizer = tiny_optimizer(model, score=score, nonfinite="skip")
    reference = tiny_optimizer(clean, score=score)
    good = range(4)
    run(model, optimizer, good[: 0 if first else 2])
    for skipped in (1, 2):
        with pytest.warns(UserWarning, match=rf"Step skipped \({skipped} so far\)"):
            bad_step(model, optimizer, "down.weight", NAN)
        assert optimizer.skipped_steps == skipped
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


def test_overflowing_factors_are_reported_before_any_weight_moves():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
    optimizer = tiny_optimizer(model)
    factors = [(1e38 * A, B) for A, B in optimizer.lora_factors("b")]
    optimizer.set_lora_factors("b", factors)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    with pytest.raises(RuntimeError, match="Scores of layer b are not finite"):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
