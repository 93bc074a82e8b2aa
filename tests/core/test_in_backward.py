"""Steps in the backward pass: the ordinary step's winners and weights, and freed gradients."""

from __future__ import annotations

import copy
import threading
import time
import warnings

import pytest
import torch
from torch import nn

from core_helpers import assert_same_bits, backward, run, snapshot, tiny_model, tiny_optimizer
from molf import AdamW, MoLFAdamW, MoLFConfig
from molf.core.step.unit import PlainUnit
from molf.core.storage import accumulation
from optimizer_forms import FORMS, build, in_form


def run_model(model: nn.Module, seed: int) -> torch.Tensor:
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    out = model(ids).flatten(0, 1).float()
    loss = nn.functional.cross_entropy(out, ids.roll(1, 1).flatten())
    loss.backward()
    return loss.detach()


def test_weights_move_before_step_and_step_moves_nothing_more():
    model, optimizer = build("folded", optimizer_in_backward=True)
    before = snapshot(model, optimizer)
    run_model(model, 0)
    moved = snapshot(model, optimizer)
    weights = ("up.weight", "down.weight", "embed.weight", "lm_head.weight", "norm.bias")
    assert all(not torch.equal(moved[name], before[name]) for name in weights)
    optimizer.step()
    assert_same_bits(snapshot(model, optimizer), moved)
    optimizer.step()  # without a backward pass
    assert_same_bits(snapshot(model, optimizer), moved)
    assert optimizer.routing == {}


def test_gradients_do_not_live_together():
    """No two layers' gradients at once, where the ordinary step needs all of them."""
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    optimizer = MoLFAdamW.from_model(layers, MoLFConfig(ranks=(2,)), optimizer_in_backward=True)
    alive = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in layers.parameters()))
        )
    layers(torch.randn(3, 8)).square().mean().backward()
    assert len(alive) == 6
    assert max(alive) <= 2  # one layer's weight and bias
    optimizer.step()
    assert list(optimizer.routing) == ["0", "1", "2", "3", "4", "5"]  # as the ordinary step has it


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_layers_that_are_unfrozen_later_step_in_the_pass(form):
    """Also those that were frozen when the hooks were made."""
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    layers[0].requires_grad_(False)
    if form == "fft":
        optimizer = AdamW(layers.parameters(), optimizer_in_backward=True)
    else:
        layers.requires_grad_(True)
        config = MoLFConfig(ranks=(2,))
        optimizer = MoLFAdamW.from_model(layers, config, optimizer_in_backward=True)
        layers[0].requires_grad_(False)
        layers, optimizer = copy.deepcopy((layers, optimizer))
    for is_trained in (False, True, False, True):
        layers[0].requires_grad_(is_trained)
        optimizer.zero_grad()
        before = layers[0].weight.detach().clone()
        layers(torch.randn(3, 8)).square().mean().backward()
        assert all(p.grad is None for p in layers.parameters())
        assert torch.equal(layers[0].weight, before) != is_trained
        optimizer.step()


def test_layers_of_several_devices_take_turns():
    """Autograd has a thread for every device; what a step shares is for one of them at a time."""
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    optimizer = MoLFAdamW.from_model(layers, MoLFConfig(ranks=(2,)), optimizer_in_backward=True)
    take, inside, most = optimizer._take_and_free, [], []

    def slowly(unit):
        inside.append(unit)
        most.append(len(inside))
        time.sleep(0.05)
        take(unit)
        inside.remove(unit)

    optimizer._take_and_free = slowly
    losses = [layer(torch.randn(3, 8)).square().mean() for layer in layers]
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    optimizer.step()
    assert most == [1, 1]
    assert set(optimizer.routing) == {"0", "1"}


def test_incomplete_layers_are_finished_by_step():
    """A bias without a gradient: the layer waits for it in vain."""
    model, optimizer = build("folded", optimizer_in_backward=True)
    twin, ordinary = build("folded")
    for each in (model, twin):
        each.up.forward = lambda x, layer=each.up: nn.functional.linear(x, layer.weight)
        run_model(each, 0)
    assert model.up.weight.grad is not None
    assert set(optimizer.routing) == {"down"}
    optimizer.step()
    ordinary.step()
    assert model.up.weight.grad is None
    assert optimizer.routing == ordinary.routing
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, ordinary))


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_accumulation_is_refused_at_the_second_backward_pass(form):
    model, optimizer = build(form, optimizer_in_backward=True)
    run_model(model, 0)
    with pytest.raises(RuntimeError, match=r"second gradient.*Call optimizer\.step\(\) after each"):
        run_model(model, 1)
    model.zero_grad()
    run_model(model, 2)  # and it can go on
    optimizer.step()


def test_bad_gradient_raises_for_its_layer_and_says_what_has_moved():
    model, optimizer = build("folded", optimizer_in_backward=True)
    run_model(model, 0)
    optimizer.step()
    before = snapshot(model, optimizer)
    handle = model.up.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match=r"Non-finite gradient in up.weight; it has not moved"):
        run_model(model, 1)
    after = snapshot(model, optimizer)
    same = {key for key in before if key.startswith("up.")}
    assert_same_bits({k: after[k] for k in same}, {k: before[k] for k in same})
    assert not torch.equal(after["down.weight"], before["down.weight"])
    handle.remove()
    model.zero_grad()
    run_model(model, 2)
    optimizer.step()
    assert set(optimizer.routing) == {"up", "down"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nonfinite": "skip"}, "nonfinite='skip' is not possible with optimizer_in_backward=True"),
        ({"grad_accumulation_dtype": "float32"}, "optimizer_in_backward=True: .*; none accumulate"),
    ],
)
@pytest.mark.parametrize("form", ["folded", "fft"])
def test_what_needs_all_gradients_is_refused(form, options, message):
    with pytest.raises(ValueError, match=message):
        build(form, optimizer_in_backward=True, **options)


@pytest.fixture
def two_processes(monkeypatch):
    """Call it, and there are two processes."""

    def start():
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    return start


FOR_ONE_PROCESS = [{"optimizer_in_backward": True}, {"grad_accumulation_dtype": "float32"}]


@pytest.mark.parametrize("options", FOR_ONE_PROCESS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("form", ["folded", "fft"])
def test_several_processes_are_refused(form, options, two_processes):
    pair = build(form, "exact", **options)
    late, late_optimizer = build(form, "exact", **options)
    two_processes()
    refused = pytest.raises(ValueError, match=f"{next(iter(options))}.* not possible with 2 pro")
    with refused:
        build(form, "exact", **options)
    with refused:
        copy.deepcopy(pair)
    before = snapshot(late, late_optimizer)
    with refused:  # processes that were started after the optimizer was built
        run_model(late, 0)
        late_optimizer.step()
    assert_same_bits(snapshot(late, late_optimizer), before)
    build(form, grad_accumulation_dtype="float32")  # nothing below float32, nothing to refuse


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_float16_is_refused(form):
    with pytest.raises(ValueError, match="with float16 weights is not possible: they need loss"):
        in_form(form, tiny_model(torch.float16), optimizer_in_backward=True)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_scaler_is_refused(form, unscale):
    """It would unscale gradients that have been used, and finds none: its own error says that."""
    model, optimizer = build(form, optimizer_in_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.arange(5)[None]).sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"GradScaler cannot be used with optimizer_in_backward"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    run_model(model, 0)
    optimizer.step()  # without one it goes on

    off = torch.amp.GradScaler("cpu", enabled=False)
    run_model(model, 1)
    off.step(optimizer)


def test_gradient_scaler_is_welcome_to_ordinary_steps():
    model, optimizer = build("folded")
    twin, plain = build("folded")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.arange(5)[None]
    for each, own in ((model, optimizer), (twin, plain)):
        loss = each(ids).sum()
        (scaler.scale(loss) if own is optimizer else loss).backward()
    scaler.step(optimizer)
    plain.step()
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, plain))


@pytest.mark.parametrize("form", ["folded", "explicit", "frozen"])
def test_layers_without_a_gradient_are_warned_of(form):
    model, optimizer = build(form, optimizer_in_backward=True)
    layer = next(m for n, m in model.named_modules() if n.endswith("down"))
    layer.forward = lambda x: x[..., :6] * 0
    run_model(model, 0)
    with pytest.warns(UserWarning, match="1 of 2 routed layers have no gradient") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_model(model, 1)
        optimizer.step()


# -- passes that do not end as they should, and optimizers that do not last -----------------------


def test_interrupted_pass_is_forgotten_by_zero_grad():
    model, optimizer = build("folded", optimizer_in_backward=True)

    def interrupt(_):
        raise MemoryError("no memory left")

    handle = model.embed.weight.register_hook(interrupt)
    with pytest.raises(MemoryError):
        run_model(model, 0)
    handle.remove()
    optimizer.zero_grad()
    run_model(model, 1)
    optimizer.step()
    assert set(optimizer.routing) == {"up", "down"}


def test_step_that_raises_ends_the_pass_and_counts_what_has_moved():
    model, optimizer = build("folded", optimizer_in_backward=True)
    forward = model.up.forward
    model.up.forward = lambda x: nn.functional.linear(x, model.up.weight)  # waits for its bias
    run_model(model, 0)
    model.up.weight.grad[0, 0] = float("nan")
    moved = sum(p.grad is None for p in model.parameters()) - 1  # all but up.weight and up.bias
    with pytest.raises(RuntimeError, match=f"has not moved, but {moved} layers"):
        optimizer.step()
    model.up.forward = forward
    model.zero_grad()
    run_model(model, 1)
    optimizer.step()
    assert set(optimizer.routing) == {"up", "down"}


def test_first_bad_layer_is_not_counted():
    model, _ = build("folded", optimizer_in_backward=True)
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(RuntimeError, match=r"lm_head.weight; it has not moved, but 0 layers"):
        run_model(model, 0)


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_hooks_end_with_the_optimizer(form):
    model, optimizer = build(form, optimizer_in_backward=True)
    del optimizer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run_model(model, 0)
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("in_backward", [False, True])
def test_newer_optimizer_takes_the_parameters_over(in_backward):
    model, old = build("folded", optimizer_in_backward=True)
    config = MoLFConfig(ranks=(2,))
    with pytest.warns(UserWarning, match="Another optimizer stepped these parameters"):
        new = MoLFAdamW.from_model(model, config, optimizer_in_backward=in_backward)
    run_model(model, 0)
    new.step()
    assert not old.state
    assert {state["step"] for state in new.state.values()} == {1}
    assert all((p.grad is None) == in_backward for p in model.parameters())


def test_closure_and_checkpointing():
    model, optimizer = build("folded", optimizer_in_backward=True)
    twin, ordinary = build("folded")
    for each in (model, twin):
        inner = each.up.forward
        each.up.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(
            inner, x, use_reentrant=False
        )
    loss = optimizer.step(lambda: run_model(model, 0))
    assert torch.equal(loss, ordinary.step(lambda: backward(twin, 0)))
    assert_same_bits(snapshot(model, optimizer), snapshot(twin, ordinary))


# -- gradients in float32 -------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_gradients_of_bfloat16_weights_add_up_in_float32(form):
    model, optimizer = build(form, "exact", grad_accumulation_dtype="float32")
    plain = tiny_model(torch.bfloat16)
    sums = {name: torch.zeros(p.shape) for name, p in plain.named_parameters()}
    rounded = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for step in range(8):
        run_model(model, step)
        plain.zero_grad()
        run_model(plain, step)
        for name, parameter in plain.named_parameters():
            sums[name] += parameter.grad.float()
            rounded[name] += parameter.grad
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, sums[name]), name
    assert any(not torch.equal(sums[name], rounded[name].float()) for name in sums)

    # The step uses them as they are.
    twin, reference = build(form)
    with torch.no_grad():
        for own, parameter in zip(twin.parameters(), model.parameters(), strict=True):
            own.copy_(parameter)
    for name, parameter in twin.named_parameters():
        parameter.grad = sums[name].clone()
    optimizer.step()
    reference.step()
    exact = optimizer.float32_weights()
    for own, parameter in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(exact[parameter], own)
    copied, _ = copy.deepcopy((model, optimizer))
    copied.zero_grad()
    run_model(copied, 0)
    assert {p.grad.dtype for p in copied.parameters()} == {torch.float32}


def test_parameters_that_come_later_accumulate_in_float32():
    model, optimizer = build("folded", "exact", grad_accumulation_dtype="float32")
    extra = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": [("extra", extra)]})
    assert extra.grad_dtype == torch.float32
    swapped = nn.Parameter(model.up.weight.detach().clone())
    model.up.weight = optimizer.param_groups[0]["params"][0] = swapped
    optimizer.zero_grad()
    run_model(model, 0)
    assert swapped.grad.dtype == torch.float32
    again = nn.Parameter(swapped.detach().clone())
    model.up.weight = optimizer.param_groups[0]["params"][0] = again
    run_model(model, 1)
    grad = again.grad.clone()
    optimizer.step()
    assert again.grad.dtype == torch.float32
    assert torch.equal(again.grad, grad.float())


def test_accumulation_is_clipped_in_float32():
    model, _ = build("fft", "exact", grad_accumulation_dtype="float32")
    run_model(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_other_accumulation_is_refused_and_old_torch_named(monkeypatch):
    with pytest.raises(ValueError, match=r"grad_accumulation_dtype='bfloat16'\. Must be"):
        build("fft", grad_accumulation_dtype="bfloat16")
    monkeypatch.setattr(accumulation, "has_grad_dtype", lambda: False)
    with pytest.raises(ImportError, match="needs a torch whose parameters have grad_dtype"):
        build("fft", "exact", grad_accumulation_dtype="float32")
    build("fft", grad_accumulation_dtype="float32")  # nothing below float32: nothing to do


# -- shallow copies -------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["original", "copy", "both in turn", "copy alone"])
@pytest.mark.parametrize("form", FORMS)
def test_shallow_copy_shares_the_hooks(form, who):
    """A layer moves once for every gradient, whichever of the two ends the pass."""
    model, optimizer = build(form, optimizer_in_backward=True)
    twin, ordinary = build(form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = copy.copy(optimizer)
        own = {"original": [optimizer], "both in turn": [optimizer, copied]}.get(who, [copied])
        del optimizer
        for step in range(4):
            run_model(model, step)
            assert all(p.grad is None for p in model.parameters())
            own[step % len(own)].step()
            run_model(twin, step)
            ordinary.step()
            twin.zero_grad()
            if form != "fft":
                assert own[step % len(own)].routing == ordinary.routing
            if who == "copy alone":
                del own[:0]
        assert_same_bits(snapshot(model, own[0]), snapshot(twin, ordinary))


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_shallow_copy_of_an_ordinary_optimizer(form):
    model, optimizer = build(form)
    twin, ordinary = build(form)
    copied = copy.copy(optimizer)
    assert copied.param_groups is optimizer.param_groups
    for step, own in enumerate([optimizer, copied, optimizer]):
        run_model(model, step)
        own.step()
        model.zero_grad()
        run_model(twin, step)
        ordinary.step()
        twin.zero_grad()
    assert_same_bits(snapshot(model, copied), snapshot(twin, ordinary))


def test_shallow_copy_that_loads_a_state_has_the_parameters_alone():
    model, optimizer = build("folded", optimizer_in_backward=True)
    run_model(model, 0)
    optimizer.step()
    copied = copy.copy(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match="Another optimizer stepped these parameters"):
        copied.load_state_dict(state)
    run_model(model, 1)
    copied.step()
    assert copied.state[model.up.weight]["step"] == 2
    assert optimizer.state[model.up.weight]["step"] == 1


@pytest.mark.parametrize("in_backward", [False, True])
def test_older_optimizer_does_not_come_back_while_the_newer_lives(in_backward):
    model, old = build("folded", optimizer_in_backward=True)
    with pytest.warns(UserWarning, match="Another optimizer stepped these parameters"):
        new = MoLFAdamW.from_model(model, MoLFConfig(ranks=(2,)), optimizer_in_backward=in_backward)
    for step in range(3):
        run_model(model, step)
        old.step()  # which has nothing to step any more
        old.zero_grad() if in_backward else None
        new.step()
        new.zero_grad()
    assert not old.state
    assert {state["step"] for state in new.state.values()} == {3}
    del new
    run_model(model, 3)
    old.step()
    run_model(model, 4)
    assert all(p.grad is None for p in model.parameters())
    old.step()
    assert {state["step"] for state in old.state.values()} == {2}


def test_units_are_made_one_by_one(monkeypatch):
    """Making all of a group for each of its parameters would cost their number squared."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(40)]
    optimizer = AdamW(parameters, optimizer_in_backward=True)
    made = []

    class Counted(PlainUnit):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr("molf.core.schedule.unit_optimizer.PlainUnit", Counted)
    sum(parameter.sum() for parameter in parameters).backward()
    assert len(made) == len(optimizer.state) == len(parameters)


def test_a_rate_that_is_no_number_is_refused_by_steps_alone():
    model = tiny_model()
    optimizer = tiny_optimizer(model, optimizer_in_backward=True)
    run(model, optimizer, [0])
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid lr=nan"):
        backward(model, 1)
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    run(model, optimizer, [1])
