"""`torch.compile` of the step, or of a function around it: the step itself runs as ever."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from core_helpers import assert_same_bits, snapshot, tiny_model
from offload_helpers import LateCarrier, carried_by
from optimizer_forms import FORMS, in_form

OPTIONS = {
    "plain": {},
    "in-backward": {"optimizer_in_backward": True},
    "offload": {"state_offload": True},
    "8bit": {"state_dtype": "8bit"},
    "skip": {"nonfinite": "skip"},
    "tensor-rate": {"lr": torch.tensor(1e-2)},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def late():
    """State in host memory, of parameters on a CPU."""
    carrier = LateCarrier()
    with carried_by(lambda _: carrier):
        yield


def pair_of(form: str, dtype: torch.dtype = torch.float32, **options):
    return in_form(form, tiny_model(dtype), **{"lr": 1e-2, **options})


def loss_of(model: nn.Module, seed: int) -> Tensor:
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("late")
def test_compiled_step_is_the_step(form, options):
    model, optimizer = pair_of(form, **options)
    twin, plain = pair_of(form, **options)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        for each, own in ((model, step), (twin, plain.step)):
            loss_of(each, seed).backward()
            own()
            each.zero_grad()
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, plain))
    if form != "fft":
        assert optimizer.routing == plain.routing
        assert set(optimizer.routing) == {"up", "down"}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("option", ["plain", "in-backward"])
@pytest.mark.parametrize("form", ["folded", "frozen", "fft"])
def test_compiled_training_step(form, option, backend):
    model, optimizer = pair_of(form, torch.float32, **OPTIONS[option])
    twin, plain = pair_of(form, torch.float32, **OPTIONS[option])
    schedules = [LambdaLR(own, lambda step: 1 / (1 + step)) for own in (optimizer, plain)]
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    @torch.compile(backend=backend)
    def train(ids):
        optimizer.zero_grad()
        out = model(ids).flatten(0, 1).float()
        loss = nn.functional.cross_entropy(out, ids.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    for seed in range(3):
        ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
        plain.zero_grad()
        loss = loss_of(twin, seed)
        loss.backward()
        plain.step()
        torch.testing.assert_close(train(ids), loss.detach())
        for schedule in schedules:
            schedule.step()
    assert calls == ["before", "after"] * 3
    assert optimizer.state[next(iter(optimizer.state))]["step"] == 3
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_step_with_a_closure(backend):
    model, optimizer = pair_of("folded")
    twin, plain = pair_of("folded")

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    loss = torch.compile(optimizer.step, backend=backend)(closure)
    expected = loss_of(twin, 0)
    expected.backward()
    plain.step()
    torch.testing.assert_close(loss, expected)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_compiled_model_beside_an_ordinary_step():
    model, optimizer = pair_of("folded", optimizer_in_backward=True)
    compiled = torch.compile(model, backend="aot_eager")
    for seed in range(2):
        loss_of(compiled, seed).backward()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
    assert set(optimizer.routing) == {"up", "down"}


WAYS = {
    "plain": lambda o: o.step,
    "scheduled": lambda o: (LambdaLR(o, lambda _: 1.0), o.step)[1],
    "compiled": lambda o: torch.compile(o.step, backend="eager"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_warnings_of_a_step_name_the_line_that_called_it(way):
    """However it is wrapped: of a first layer without gradient, a skipped step, and an idle one."""
    model, optimizer = pair_of("folded", nonfinite="skip")
    step = way(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(model, 0).backward()
        model.down.weight.grad = None
        step()
        model.zero_grad()
        step()
        loss_of(model, 1).backward()
        model.up.weight.grad[0, 0] = float("nan")
        step()
    parts = ("no gradient in the first", "No parameter has a gradient", "Step skipped")
    ours = [w for w in caught if any(part in str(w.message) for part in parts)]
    assert [part for w in ours for part in parts if part in str(w.message)] == list(parts)
    assert {w.filename for w in ours} == {__file__}


def test_warnings_at_construction_name_the_line_of_the_caller():
    from molf import AdamW, MoLFAdamW, MoLFConfig

    model = tiny_model(torch.float16)
    with pytest.warns(UserWarning, match="rounded to nearest") as caught:
        AdamW(model.parameters())
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="rounded to nearest") as caught:
        MoLFAdamW.from_model(model, MoLFConfig(ranks=(2,)))
    assert caught[0].filename == __file__
