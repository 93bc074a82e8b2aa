"""States that live in host memory: the bits of those that do not, whatever moves them, and when."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import Tensor, nn

import molf
from core_helpers import Conv1D, TinyModel, assert_same_bits, feed, snapshot, tiny_optimizer
from molf import AdamW, MoLFAdamW, MoLFConfig
from molf.core.step.guard import largest_square
from molf.core.storage.offload import CudaCarrier, StateOffload
from offload_helpers import LateCarrier, carried_by
from optimizer_forms import ADAPTERS, FORMS, STORAGES, build


@pytest.fixture
def carrier():
    carrier = LateCarrier()
    with carried_by(lambda _: carrier):
        yield carrier


class Large(TinyModel):
    """It has tensors of 8 bits, and one in the other layout."""

    def __init__(self) -> None:
        super().__init__(vocabulary=64, width=64, hidden=128)
        self.turned = Conv1D(64, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        inner = self.norm(self.up(x)).tanh()
        return self.lm_head(x + self.down(inner) + self.turned(inner))


def made(form: str, storage: str = "float32", **options):
    """PEFT does not know our `Conv1D`."""
    targets = {"target_modules": ["up", "down"]} if form in ADAPTERS else {}
    return build(form, storage, model=Large, **targets, **options)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.zero_grad()
    ids = torch.randint(64, (4, 5), generator=torch.Generator().manual_seed(seed))
    device = next(model.parameters()).device
    out = model(ids.to(device)).flatten(0, 1).float()
    nn.functional.cross_entropy(out, ids.to(device).roll(1, 1).flatten()).backward()
    optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]


def test_what_comes_next_is_fetched_before_what_is_used_goes_back(carrier):
    model, optimizer = made("fft", state_offload=True)
    run(model, optimizer, 0)
    count = len(list(model.parameters()))
    assert carrier.log.count("put back") == count
    carrier.log.clear()
    run(model, optimizer, 1)
    assert carrier.log.count("fetch") == count
    start = ["fetch", "arrive", "fetch", "put back", "arrive", "fetch", "put back"]
    # From the third on, one has to be back, and freed, before another is fetched.
    ongoing = ["arrive", "return", "fetch", "put back"] * (count - 3)
    end = ["arrive", "put back", "return", "return", "return"]
    assert carrier.log == [*start, *ongoing, *end]


@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_no_more_than_three_neighbours_are_on_the_device(carrier, in_backward):
    layers = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(8)])
    config = MoLFConfig(ranks=(4,))
    optimizer = MoLFAdamW.from_model(
        layers, config, state_offload=True, optimizer_in_backward=in_backward
    )
    one = 4 * (2 * 32 * 32 + 3 * 2 * 4 * 32)
    for step in range(3):
        carrier.peak = 0
        torch.manual_seed(step)
        layers(torch.randn(3, 32)).square().mean().backward()
        optimizer.step()
        assert carrier.peak == (0 if step == 0 else 3 * one)
        assert carrier.now == 0
        layers.zero_grad()


def test_another_order_and_missing_gradients_change_nothing(carrier):
    """What is fetched ahead in vain is left, and what comes unexpectedly is fetched."""
    model, optimizer = made("folded", state_offload=True, optimizer_in_backward=True)
    twin, ordinary = made("folded", optimizer_in_backward=True)
    for step in range(6):
        for each, own in ((model, optimizer), (twin, ordinary)):
            layers = list(
                dict.fromkeys(name.rpartition(".")[0] for name, _ in each.named_parameters())
            )
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(layers.index(name.rpartition(".")[0]) % 4 != step % 4)
            own.zero_grad()  # puts hooks on what needs gradients now
            run(each, own, step)
        assert_same_bits(snapshot(model, optimizer), snapshot(twin, ordinary))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("form", ["folded", "explicit", "frozen"])
def test_overflow_of_the_last_factors_leaves_everything(carrier, form, steps, nonfinite):
    """A gradient that just fits; what the last layer makes of it for its factors does not."""
    model, optimizer = made(form, state_offload=True, nonfinite=nonfinite)
    for step in range(steps):
        run(model, optimizer, step)
    before = snapshot(model, optimizer)
    last = [group for group in optimizer.param_groups if group["layer"]][-1]["params"]
    spoilt = last[0] if form == "folded" else last[-1]  # the weight, or lora_B
    handle = spoilt.register_hook(
        lambda grad: grad * (0.8 * largest_square(grad.dtype) ** 0.5 / grad.norm())
    )
    with ExitStack() as stack:
        if nonfinite == "raise":
            stack.enter_context(
                pytest.raises(RuntimeError, match=r"Gradient too large in .* no weight")
            )
        else:
            stack.enter_context(
                pytest.warns(UserWarning, match=r"Gradient too large in .* skipped")
            )
        run(model, optimizer, steps)
    handle.remove()
    assert_same_bits(snapshot(model, optimizer), before)
    assert carrier.now == 0


def test_errors_underway_leave_states_where_they_live(carrier):
    """A layer whose scores overflow: those before it have moved, it and those after it have not."""
    model, optimizer = made("folded", state_offload=True)
    for step in (0, 1):
        run(model, optimizer, step)
    state = optimizer.state[model.down.weight]
    sound = state["lora_A_exp_avg"].clone()
    state["lora_A_exp_avg"].fill_(float("inf"))
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="Scores of layer down are not finite"):
        run(model, optimizer, 2)
    after = snapshot(model, optimizer)
    changed = {key for key in before if not _same(after[key], before[key])}
    assert {key.split(".")[0] for key in changed} == {"up"}
    assert all(carrier.holds(tensor) for tensor in tensors(optimizer))
    state["lora_A_exp_avg"].copy_(sound)
    run(model, optimizer, 3)
    assert all(t.isfinite().all() for t in tensors(optimizer))
    assert carrier.now == 0


@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_a_bad_gradient_leaves_states_where_they_live(carrier, in_backward):
    """Those of layers that have moved before it, too."""
    layers = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(2 if in_backward else 1)])
    optimizer = MoLFAdamW.from_model(
        layers, MoLFConfig(ranks=(2,)), state_offload=True, optimizer_in_backward=in_backward
    )
    for spoilt in (False, True):
        if spoilt:
            layers[0].weight.register_hook(lambda grad: grad * float("nan"))
        with pytest.raises(RuntimeError, match="Non-finite") if spoilt else nullcontext():
            layers(torch.ones(3, 8)).square().mean().backward()
            optimizer.step()
        assert all(t.isfinite().all() for t in tensors(optimizer))
        assert carrier.now == 0


def test_backward_passes_that_zero_grad_ends(carrier):
    """One layer: what comes next in the recorded order is what is being used."""
    found = []
    for offloaded in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        optimizer = MoLFAdamW.from_model(
            layer,
            MoLFConfig(ranks=(2,)),
            lr=1e-2,
            state_offload=offloaded,
            optimizer_in_backward=True,
        )
        for number in range(8):
            layer(torch.randn(3, 8)).square().mean().backward()
            optimizer.step() if number % 3 == 1 else optimizer.zero_grad()
            assert carrier.now == 0
        found.append(snapshot(layer, optimizer))
    assert_same_bits(*found)


def test_borrowed_twice_in_a_row(carrier):
    """Then it would come next; but not before it is back."""
    offload, parameter = StateOffload(), nn.Parameter(torch.zeros(3))
    states = {parameter: {"count": offload.keep(parameter, torch.zeros(3))}}
    for _ in range(3):
        for _ in range(2):
            with offload.on_device(states, [parameter]) as lent:
                lent[parameter]["count"] += 1
        offload.end_step()
    assert states[parameter]["count"].tolist() == [6, 6, 6]


def test_interrupted_while_waiting(monkeypatch, carrier):
    """Ctrl-C in a notebook, say: what was on its way back arrives when the state is read."""
    model, optimizer = made("folded", state_offload=True)
    for step in (0, 1):
        run(model, optimizer, step)
    put_back, armed = carrier.put_back, [True]

    def interrupted(lent, kept):
        wait = put_back(lent, kept)

        def arrive() -> None:
            if armed:
                armed.clear()
                raise KeyboardInterrupt
            wait()

        return arrive

    monkeypatch.setattr(carrier, "put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, optimizer, 2)
    assert not armed
    optimizer.state_dict()
    assert all(t.isfinite().all() for t in tensors(optimizer))
    assert carrier.now == 0
    run(model, optimizer, 3)
    assert all(t.isfinite().all() for t in tensors(optimizer))


def test_no_room_for_what_is_put_back(monkeypatch, carrier):
    """What else of the layer was on its way back arrives all the same."""
    layer = nn.Linear(8, 4)
    optimizer = MoLFAdamW.from_model(layer, MoLFConfig(ranks=(2,)), state_offload=True)
    room = carrier.room

    def crowded(like: Tensor) -> Tensor:
        if like.shape == layer.bias.shape:
            raise RuntimeError("no room")
        return room(like)

    monkeypatch.setattr(carrier, "room", crowded)
    feed(layer, 0)
    with pytest.raises(RuntimeError, match="no room"):
        optimizer.step()
    optimizer.state_dict()
    assert "exp_avg" in optimizer.state[layer.weight]
    assert all(t.isfinite().all() for t in tensors(optimizer))


def test_state_that_is_read_before_the_step_ends_is_complete(carrier):
    model, optimizer = made("folded", "exact", state_offload=True, optimizer_in_backward=True)
    twin, ordinary = made("folded", "exact", optimizer_in_backward=True)
    for each, own in ((model, optimizer), (twin, ordinary)):
        run(each, own, 0)
        step, own.step = own.step, lambda: None
        run(each, own, 1)  # moved, and `step` is still to come
        own.step = step
    weights = [own.float32_weights().values() for own in (optimizer, ordinary)]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    _assert_same_state(optimizer.state_dict(), ordinary.state_dict())


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_factors_are_read_and_replaced(carrier, form, steps):
    pairs = [made(form, "exact", state_offload=offloaded) for offloaded in (True, False)]
    found = []
    for model, optimizer in pairs:
        for step in range(steps):
            run(model, optimizer, step)
        layer = optimizer.param_groups[0]["layer"]
        factors = [(A + 1, B - 1) for A, B in optimizer.lora_factors(layer)]
        optimizer.set_lora_factors(layer, factors)
        optimizer.reset_low_halves()
        found.append(optimizer.lora_factors(layer))
        run(model, optimizer, 9)
    for one, other in zip(*found, strict=True):
        assert all(map(torch.equal, one, other))
    assert all(carrier.holds(tensor) for tensor in tensors(pairs[0][1]))
    assert_same_bits(snapshot(*pairs[0]), snapshot(*pairs[1]))


def test_parameters_whose_states_stay(carrier):
    """A model whose layers are on several devices."""
    model, ordinary = made("folded")
    with carried_by(lambda device: None):
        twin, optimizer = made("folded", state_offload=False)
    optimizer.offload = StateOffload()
    optimizer.offload._carrier = lambda p: carrier if p.dim() == 2 else None
    for step in range(3):
        run(model, ordinary, step)
        run(twin, optimizer, step)
    assert_same_bits(snapshot(model, ordinary), snapshot(twin, optimizer))
    assert {carrier.holds(tensor) for tensor in tensors(optimizer)} == {True, False}


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_without_effect_beside_a_cpu(form):
    model = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="state_offload=True is without effect: no trained"):
        optimizer = (
            AdamW(model.parameters(), state_offload=True)
            if form == "fft"
            else MoLFAdamW.from_model(model, MoLFConfig(ranks=(2,)), state_offload=True)
        )
    feed(model, 0)
    optimizer.step()


def test_kernels_are_refused():
    pytest.importorskip("triton")
    with pytest.raises(
        ValueError, match=r"'triton' is not possible with state_offload=True.*Leave"
    ):
        AdamW(nn.Linear(4, 4).parameters(), kernels="triton", state_offload=True)


def test_trainers_factory_takes_it(carrier):
    factory, options = molf.trainer_optimizer(MoLFConfig(ranks=(2,)), lr=1e-3, state_offload=True)
    assert factory()(TinyModel(), **options).state_offload


def test_the_log_says_so(carrier, caplog):
    with caplog.at_level("INFO", logger="molf"):
        tiny_optimizer(TinyModel(), state_offload=True)
    assert "eager torch operations, and keeps its state in host memory." in caplog.text


# -- CUDA -----------------------------------------------------------------------------------------


class FakeStream:
    """A stream that writes down what it is told."""

    log: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for the event of {event.name}")

    def record_event(self) -> FakeEvent:
        self.log.append(f"event of {self.name}")
        return FakeEvent(self.name, self.log)

    def __enter__(self) -> None:
        self.log.append(f"on {self.name}:")

    def __exit__(self, *_: object) -> None:
        self.log.append("done")


class FakeEvent:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(f"the host waits for the event of {self.name}")


@pytest.mark.parametrize("pinned", [True, False])
def test_order_of_streams_and_events(monkeypatch, pinned):
    """What is asked of CUDA, without CUDA."""
    log = FakeStream.log = []
    names = iter(["inbound", "outbound"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(next(names)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("current"))
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: pinned)
    copy_ = Tensor.copy_

    def noted(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        log.append(f"copy, {'not ' * non_blocking}blocking")
        return copy_(tensor, source)

    monkeypatch.setattr(Tensor, "copy_", noted)
    carrier = CudaCarrier(torch.device("cpu"))
    kept = [torch.arange(3.0)]
    lent, arrive = carrier.fetch(kept)
    arrive()
    lent[0] += 1
    carrier.put_back(lent, kept)()
    assert kept[0].tolist() == [1, 2, 3]
    assert log == [
        "on inbound:",
        f"copy, {'not ' * pinned}blocking",
        "event of inbound",
        "done",
        "current waits for the event of inbound",
        "outbound waits for current",
        "on outbound:",
        f"copy, {'not ' * pinned}blocking",
        "event of outbound",
        "done",
        "the host waits for the event of outbound",
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_on_cuda(form, storage, in_backward):
    how = {"optimizer_in_backward": in_backward}
    pairs = []
    for offloaded in (True, False):
        made_on_cuda = lambda: Large().cuda()  # noqa: E731
        pairs.append(build(form, storage, model=made_on_cuda, state_offload=offloaded, **how))
    for step in range(5):
        for model, optimizer in pairs:
            run(model, optimizer, step)
        found = [
            {k: v.cpu() if torch.is_tensor(v) else v for k, v in snapshot(*pair).items()}
            for pair in pairs
        ]
        assert_same_bits(*found)
    assert all(t.is_pinned() for t in tensors(pairs[0][1]))
    assert all(t.is_cuda for t in tensors(pairs[1][1]))
    for (_, optimizer), (_, other) in (pairs, pairs[::-1]):
        optimizer.load_state_dict(other.state_dict())
    assert all(t.is_pinned() for t in tensors(pairs[0][1]))
    assert all(t.is_cuda for t in tensors(pairs[1][1]))


@pytest.mark.gpu
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "in backward"])
def test_memory_on_cuda(in_backward):
    """Of 16 layers' moments no more than three layers' are there, and none between steps."""
    width, count = 2048, 16
    layers = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)]).cuda()
    optimizer = AdamW(layers.parameters(), state_offload=True, optimizer_in_backward=in_backward)
    one = 4 * width * width
    inputs = torch.randn(8, width, device="cuda")
    for _ in range(3):
        layers(inputs).square().mean().backward()
        held = (1 if in_backward else 2) * count * one  # weights, gradients
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        if not in_backward:
            # Two moments of three layers, and temporaries of one.
            assert torch.cuda.max_memory_allocated() < held + (2 * 3 + 4) * one
        layers.zero_grad()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() < (count + 2) * one
    torch.cuda.reset_peak_memory_stats()
    layers(inputs).square().mean().backward()
    held = (1 if in_backward else 2) * count * one
    if in_backward:  # and gradients of two
        assert torch.cuda.max_memory_allocated() < held + (2 * 3 + 4 + 2) * one


def _same(one: object, other: object) -> bool:
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def _assert_same_state(one: dict, other: dict) -> None:
    assert one["state"].keys() == other["state"].keys()
    for key, own in one["state"].items():
        assert_same_bits(dict(own), dict(other["state"][key]))
