"""What holds in every form and every storage, whatever runs the step.

Each test is one invariant, and runs in the cells of a table of forms (`optimizer_forms.FORMS`),
storages (`optimizer_forms.STORAGES`) and executors (`executors.EXECUTORS`). It uses the optimizer
as its documentation has it; it does not know how a step is computed.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from core_helpers import assert_same_bits
from executors import EXECUTORS, ReadsOfTheHost
from optimizer_cells import ROUTED, Cell, Training, cells

# torch's, of the missing process group
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")


# Where a step looks at a tensor in blocks, or does not know beforehand whether it may happen, makes
# no difference to what is kept between steps.
PERSISTENT = ("eager", "backward", "offload", "offload backward", "triton")


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    """One cell of the table."""
    form, storage, name = request.param
    with EXECUTORS[name].around() as carrier:
        yield Cell(form, storage, EXECUTORS[name], carrier)


def same(one: Training, other: Training) -> None:
    assert_same_bits(one.bits(), other.bits())
    assert one.routing == other.routing


def scheduled(training: Training) -> LambdaLR:
    return LambdaLR(training.optimizer, lambda step: 1 / (1 + step))


# -- the step -------------------------------------------------------------------------------------


@cells()
def test_steps_are_those_of_torch_operations_on_whole_tensors(cell):
    """And measuring what rounding loses changes nothing."""
    training, plain = cell.build(), cell.build(eager=True)
    training.optimizer.measure_updates = True
    schedules = [scheduled(training), scheduled(plain)]
    for step in range(3):
        training.backward(step)
        if cell.executor.is_in_backward:
            assert all(p.grad is None for p in training.model.parameters())  # freed
        training.optimizer.step()
        training.optimizer.zero_grad()
        cell.check_place(training)
        with EXECUTORS["eager"].around():
            plain.train(step)
        agree(cell, training, plain)
        for schedule in schedules:
            schedule.step()
    assert training.optimizer.update_fidelity.kept == pytest.approx(1, abs=0.5)
    assert plain.optimizer.update_fidelity is None
    assert set(training.routing) == (set() if cell.form == "fft" else set(ROUTED))


def agree(cell: Cell, one: Training, other: Training) -> None:
    """Same winners and bits, or numbers as near as the storage allows."""
    if cell.executor.has_eager_bits:
        return same(one, other)
    near = 2e-5 if cell.form != "fft" else 2e-6  # parts of the largest number
    near = {"float64": 1e-12, "nearest": 2**-8, "stochastic": 2**-8}.get(cell.storage, near)
    assert one.routing.keys() == other.routing.keys()
    for name, decision in other.routing.items():
        assert one.routing[name].winners == decision.winners
        assert one.routing[name].scores == pytest.approx(decision.scores, rel=1e-4)
    got, expected = one.bits() | one.values(), other.bits() | other.values()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert type(got[key]) is type(value)
        if not isinstance(value, Tensor):
            assert got[key] == value, key
        elif value.is_floating_point():  # not the last bits that codes and lower halves hold
            assert got[key].dtype == value.dtype
            limit = near * value.double().abs().max().item()
            torch.testing.assert_close(got[key], value, rtol=0, atol=limit, msg=key)
    return None


@cells(storages=["exact", "8bit"])
def test_exact_bfloat16_is_the_float32_run(cell):
    """Weights, factors and moments, bit for bit, where steps are far below a bfloat16's unit."""
    exact = cell.build(lr=2e-5, lora_lr=6e-5)
    storage = {"exact": "float32", "8bit": "float32 8bit"}[cell.storage]
    whole = dataclasses.replace(cell, storage=storage)
    whole = whole.with_weights_of(exact, lr=2e-5, lora_lr=6e-5)
    rounded = [name for name, p in exact.trained.items() if p.dtype == torch.bfloat16]
    start = exact.values()
    for step in range(3):
        exact.train(step)
        whole.train(step, changed=dict.fromkeys(rounded, lambda grad: grad.bfloat16().float()))
        assert exact.routing == whole.routing
    assert_same_bits(exact.values(), whole.values())
    bits, expected = exact.bits(), whole.bits()
    assert {key for key in bits if key.endswith("/low")} == {f"{name}/low" for name in rounded}
    states = [key for key in expected if "/" in key]
    assert_same_bits({key: bits[key] for key in states}, {key: expected[key] for key in states})
    for name in rounded:  # a model computes with the nearest bfloat16, up to ties
        value = exact.values()[name].double()
        error = (exact.trained[name].double() - value).abs()
        assert torch.equal(error, (value.bfloat16().double() - value).abs()), name
    moved = [n for n in rounded if not torch.equal(exact.values()[n], start[n])]
    assert any("embed" in name for name in moved)


@cells("eager", "blocks", "accelerator", "triton")
def test_a_rate_of_zero_moves_no_weight(cell):
    training = cell.build().train(0, 1)
    before, bits = training.values(), training.bits()
    rates = [group["lr"] for group in training.optimizer.param_groups]
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    training.train(2, 3)
    training.train(4, changed=dict.fromkeys(training.trained, torch.zeros_like))
    assert_same_bits(training.values(), before)
    after = training.bits()
    weights = dict(training.model.named_parameters())
    assert_same_bits({n: after[n] for n in weights}, {n: bits[n] for n in weights})
    assert all(v.isfinite().all() for v in after.values() if isinstance(v, Tensor))
    for group, rate in zip(training.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    training.train(5)
    assert any(not torch.equal(v, before[n]) for n, v in training.values().items())


@cells(*PERSISTENT)
def test_the_order_of_layers_and_gradients_does_not_matter(cell):
    one, other = cell.build(), cell.build(is_reversed=True)
    names = [list(training.trained) for training in (one, other)]
    assert names[0] != names[1]
    for step in range(3):
        one.train(step)
        other.train(step, is_reversed=step == 2)
        same(one, other)


@cells()
def test_what_gets_no_gradient_is_left_alone(cell):
    training = cell.build().train(0)
    before = training.bits()
    training.optimizer.step()
    assert training.routing == {}
    assert_same_bits(training.bits(), before)
    still = {n for n in training.trained if "wide" in n or n.endswith("norm.weight")}
    training.train(1, without=still)
    after = training.bits()
    for key, value in before.items():
        own = key.split("/")[0]
        if own in still:
            assert_same_bits({key: after[key]}, {key: value})
        elif key.endswith("/step"):
            assert after[key] == 2
    assert len(still) > 1
    assert set(training.routing) == set() if cell.form == "fft" else {"up", "turned"}
    training.train(2)
    counters = {k.split("/")[0]: v for k, v in training.bits().items() if k.endswith("/step")}
    assert counters == {name: 2 if name in still else 3 for name in training.trained}


@cells("eager", "backward", "offload", "triton")
def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned(cell):
    training, twin = cell.build(), cell.build()
    losses = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        losses.append(training.backward(0))
        return losses[-1]

    with torch.no_grad():
        assert training.optimizer.step(closure) is losses[0]
    assert losses == [twin.backward(0)]
    assert twin.optimizer.step() is None
    same(training, twin)


@cells(*PERSISTENT)
def test_a_step_depends_on_nothing_else_of_the_process(cell):
    """Not on torch's generator, which it does not move either, nor on the default device."""
    training, twin = cell.build(), cell.build()
    training.train(0, 1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    twin.train(0)
    twin.backward(1)
    with torch.device("meta"):
        twin.optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)
    same(twin, training)


@cells("accelerator")
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_the_host_waits_once_for_all_layers_or_once_for_each(cell, in_backward, monkeypatch):
    training = cell.build(optimizer_in_backward=in_backward)
    layers = {frozenset(training.layer_of(name)) for name in training.trained}
    reads = ReadsOfTheHost(monkeypatch)
    for step in range(2):
        reads.count = 0
        with reads:
            if not in_backward:
                training.optimizer.require_finite(torch.tensor(1.0), torch.tensor(2.0))
            training.train(step)
        assert reads.count == (len(layers) if in_backward else 1)
    with reads:
        bool(next(training.model.parameters()).sum() > 0)
    assert reads.count > 1  # the counter counts


# -- steps that are refused -----------------------------------------------------------------------


def last(grad: Tensor, value: float) -> Tensor:
    grad.view(-1)[-1] = value
    return grad


BAD = {  # what is done to a gradient; the limit is the number whose square is the largest
    "nan": lambda grad, limit: last(grad, float("nan")),
    "inf": lambda grad, limit: last(grad, -float("inf")),
    "infinities": lambda grad, limit: last(last(grad, -float("inf")).flip(0), float("inf")),
    "large": lambda grad, limit: last(grad, 2 * limit),
    # Itself small enough; what the layer makes of it for its LoRA factors is not.
    "large for factors": lambda grad, limit: grad * (0.4 * limit / grad.norm()),
}


@cells("eager", "accelerator", "backward", "offload", "triton")
def test_a_bad_gradient_writes_nothing(cell):
    training, twin = cell.build().train(0), cell.build().train(0)
    before = training.bits()
    for bad, name, reason in bad_gradients(cell, training):
        with pytest.raises(RuntimeError, match=f"{reason} in {clean(name)}[; ]"):
            take_bad_step(cell, training, bad, name)
        assert_same_bits(training.bits(), before)
        assert training.routing == {}
        training.optimizer.zero_grad()
    if not cell.executor.is_in_backward:
        reasons = []
        training.optimizer.nonfinite, training.optimizer.on_skipped = "skip", reasons.append
        for bad, name, reason in bad_gradients(cell, training)[::2]:
            take_bad_step(cell, training, bad, name)
            assert reasons[-1].startswith(f"{reason} in {clean(name)}")
            assert_same_bits(training.bits(), before)
            assert training.routing == {}
        assert len(reasons) == training.optimizer.skipped_steps
    for step in (1, 2):
        same(training.train(step), twin.train(step))


def bad_gradients(cell: Cell, training: Training) -> list[tuple[str, str, str]]:
    """Kinds of bad gradients, the parameters that get them, and what is said of them."""
    ends = ["up.weight", "turned.bias", "embed.weight", "norm.bias"]
    ends += ["wide.lora_A.default.weight", "up.lora_B.default.weight"]
    names = [name for name in training.trained if clean(name) in ends]
    found = [
        (bad, name, "Gradient too large" if bad == "large" else "Non-finite gradient")
        for number, bad in enumerate(list(BAD)[:4])
        for name in names[number % 2 :: 2]
    ]
    for_factors = {"explicit": ends[-1], "frozen": ends[-1], "fft": None}.get(cell.form, ends[0])
    found += [
        ("large for factors", name, "Gradient too large")
        for name in names
        if clean(name) == for_factors
    ]
    assert len(found) >= 6
    return found


def take_bad_step(cell: Cell, training: Training, bad: str, name: str) -> None:
    dtype = torch.promote_types(training.trained[name].dtype, torch.float32)
    limit = torch.finfo(dtype).max ** 0.5
    without = set(training.trained) - training.layer_of(name)
    training.train(
        9,
        changed={name: lambda grad: BAD[bad](grad, limit)},
        without=without if cell.executor.is_in_backward else (),  # they would move before it
    )


def clean(name: str) -> str:
    """A parameter's name in the model without the adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@cells("eager", "accelerator", "offload", "triton")
def test_a_loss_or_norm_that_is_not_finite_writes_nothing(cell):
    training, twin = cell.build().train(0), cell.build().train(0)
    before = training.bits()
    one, nan, inf = map(torch.tensor, (1.0, float("nan"), float("inf")))
    for given, reason in (
        ((nan,), "loss (nan)"),
        ((inf, one), "loss (inf)"),
        ((one, nan), "gradient norm (nan)"),
    ):
        training.backward(9)
        training.optimizer.require_finite(*given)
        with pytest.raises(RuntimeError, match=re.escape(f"Non-finite {reason}; no weight")):
            training.optimizer.step()
        assert_same_bits(training.bits(), before)
        training.optimizer.zero_grad()
    training.optimizer.require_finite(one, one)
    same(training.train(1), twin.train(1))


# -- saving, loading, copying, swapping -----------------------------------------------------------


@cells(*PERSISTENT)
def test_a_saved_state_resumes_with_the_same_bits(cell):
    training = cell.build()
    schedule = scheduled(training)
    for step in range(2):
        training.train(step)
        schedule.step()
    file = io.BytesIO()
    torch.save([training.optimizer.state_dict(), schedule.state_dict()], file)
    state, schedule_state = loaded(file)
    resumed = cell.with_weights_of(training)
    resumed_schedule = scheduled(resumed)
    resumed.optimizer.load_state_dict(state)
    resumed_schedule.load_state_dict(schedule_state)
    assert_same_bits(resumed.bits(), training.bits())
    cell.check_place(resumed)
    for step in range(2, 5):
        same(resumed.train(step), training.train(step))
        schedule.step()
        resumed_schedule.step()
    # What was loaded is the caller's.
    for key, expected in loaded(file)[0]["state"].items():
        assert_same_bits(state["state"][key], expected)


def loaded(file: io.BytesIO) -> Any:
    file.seek(0)
    return torch.load(file, weights_only=True)


@cells("backward", "offload", "offload backward", "triton")
@pytest.mark.parametrize("into_eager", [True, False], ids=["into eager", "from eager"])
def test_a_state_moves_between_executors(cell, into_eager):
    """Also into an optimizer that has taken steps of its own; and the two share nothing."""
    training = cell.build(eager=not into_eager).train(0, 1)
    other = cell.build(eager=into_eager).train(7)
    other.model.load_state_dict(training.model.state_dict())
    other.optimizer.load_state_dict(training.optimizer.state_dict())
    before = training.bits()
    assert_same_bits(other.bits(), before)
    other.train(2, 3)
    assert_same_bits(training.bits(), before)
    training.train(2, 3)
    agree(cell, training, other)
    cell.check_place(training if into_eager else other)


@cells("eager", "offload", storages=["8bit"])
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])
def test_a_distributed_checkpoint_resumes_with_the_same_bits(cell, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    training, resumed = cell.build().train(0, 1), cell.build()
    state = get_optimizer_state_dict(training.model, training.optimizer, options=options)
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = get_optimizer_state_dict(resumed.model, resumed.optimizer, options=options)
    assert_same_bits(resumed.values(), cell.build().values())  # reading has taken an empty step
    dcp.load(loaded, checkpoint_id=tmp_path)
    resumed.model.load_state_dict(training.model.state_dict())
    set_optimizer_state_dict(resumed.model, resumed.optimizer, loaded, options=options)
    assert_same_bits(resumed.bits(), training.bits())
    cell.check_place(resumed)
    for step in (2, 3):
        same(resumed.train(step), training.train(step))


@cells(*PERSISTENT)
def test_copies_train_on_with_the_same_bits_and_apart(cell):
    how = {} if cell.executor.is_in_backward else {"nonfinite": "skip"}
    training = cell.build(**how).train(0, 1)
    before = training.bits()
    copies = [copy.deepcopy(training), pickle.loads(pickle.dumps(training))]
    for twin in copies:
        same(twin, training)
        cell.check_place(twin, training)
        assert twin.optimizer.nonfinite == training.optimizer.nonfinite
        twin.train(2, 3)
        assert_same_bits(training.bits(), before)
    training.train(2, 3)
    for twin in copies:
        same(twin, training)
        if how:
            with pytest.warns(UserWarning, match="Non-finite gradient in .* Step skipped"):
                take_bad_step(cell, twin, "nan", next(iter(twin.trained)))
            assert (twin.optimizer.skipped_steps, training.optimizer.skipped_steps) == (1, 0)


@cells(*PERSISTENT)
def test_parameters_may_be_swapped_before_the_first_step(cell):
    """As accelerate and FSDP2 do after the optimizer is built: same positions, new objects."""
    training, plain = cell.build(), cell.build()
    new = {
        parameter: nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for parameter in training.model.parameters()
    }
    for module in training.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = new[parameter]
    for group in training.optimizer.param_groups:
        group["params"] = [new[parameter] for parameter in group["params"]]
    for step in range(3):
        same(training.train(step), plain.train(step))
    assert not any(parameter in training.optimizer.state for parameter in new)
    training.backward(3)
    if cell.executor.is_in_backward:
        assert all(parameter.grad is None for parameter in new.values())
