"""`step_was_skipped`, and schedules after a step that `nonfinite="skip"` has skipped."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from core_helpers import backward, run, tiny_model
from optimizer_forms import FORMS, in_form


def pair_of(form: str = "folded"):
    return in_form(form, tiny_model(), lr=1e-2, nonfinite="skip")


def bad_step(model, optimizer) -> None:
    backward(model, 9)
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_step_was_skipped_is_of_the_last_step(form):
    model, optimizer = pair_of(form)
    assert optimizer.step_was_skipped is False
    run(model, optimizer, [0])
    assert optimizer.step_was_skipped is False
    bad_step(model, optimizer)
    assert optimizer.step_was_skipped is True
    assert copy.deepcopy((model, optimizer))[1].step_was_skipped is True
    optimizer.zero_grad()
    assert optimizer.step_was_skipped is True
    run(model, optimizer, [1])
    assert optimizer.step_was_skipped is False
    optimizer.require_finite(torch.tensor(float("inf")))
    run(model, optimizer, [])
    backward(model, 2)
    optimizer.require_finite(torch.tensor(float("inf")))
    optimizer.step()
    assert optimizer.step_was_skipped is True
    assert optimizer.skipped_steps == 2


def test_a_step_that_raises_was_not_skipped():
    model, optimizer = in_form("folded", tiny_model(), lr=1e-2)
    backward(model, 0)
    model.up.weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="Non-finite gradient"):
        optimizer.step()
    assert optimizer.step_was_skipped is False


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("waits", [False, True])
def test_accelerates_schedules_go_on_unless_the_loop_asks_the_optimizer(accelerator, waits):
    """accelerate knows of the steps alone that its GradScaler skips."""
    model, optimizer = pair_of()
    schedule = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    wrapped_model, wrapped, wrapped_schedule = accelerator.prepare(model, optimizer, schedule)
    rates = []
    for bad in (False, True, False):
        (bad_step if bad else lambda m, o: run(m, o, [0]))(wrapped_model, wrapped)
        assert wrapped.optimizer.step_was_skipped is bad
        assert wrapped.step_was_skipped is False
        if not (waits and wrapped.optimizer.step_was_skipped):
            wrapped_schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == ([0.005, 0.005, 0.0025] if waits else [0.005, 0.0025, 0.00125])
    assert optimizer.skipped_steps == 1


def test_a_step_that_a_gradient_scaler_skips_never_reaches_the_optimizer():
    model, optimizer = pair_of()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.arange(5)[None]).sum()).backward()
    model.up.weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert optimizer.step_was_skipped is False
    assert optimizer.skipped_steps == 0
