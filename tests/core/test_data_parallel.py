"""Two processes that train one model (DDP): what must be equal, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from core_helpers import snapshot, tiny_model
from forked import start_forked
from molf import AdamW
from optimizer_forms import build

FORMS = ["folded", "explicit", "frozen", "fft"]
CASES = [(form, rounding) for form in FORMS for rounding in (None, "exact", "stochastic")]
DTYPES = [torch.float32, torch.bfloat16]
STEPS = 3
LR = 1e-3


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())


def batch(step: int) -> Tensor:
    return torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(step))


def weights(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The float32 values, with the lower halves where there are some."""
    exact = optimizer.float32_weights()
    return {name: exact.get(p, p.detach()).clone() for name, p in model.named_parameters()}


def train(rank: int, folder: str) -> None:
    """One of two processes: its half of every batch, in every form."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    found = {"refused": [], "late": []}
    late = {
        name: build("folded", "exact", **{name: value})
        for name, value in (("optimizer_in_backward", True), ("grad_accumulation_dtype", "float32"))
    }
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        for name, (model, optimizer) in late.items():
            try:
                if name == "optimizer_in_backward":
                    loss_of(model, batch(0)).backward()
                optimizer.step()
            except ValueError as error:
                found["late"].append(str(error))
            try:
                value = {"optimizer_in_backward": True}.get(name, "float32")
                build("folded", "exact", **{name: value})
            except ValueError as error:
                found["refused"].append(str(error))
        for form, rounding in CASES:
            model, optimizer = build(form, rounding or "float32", lr=LR, lora_lr=None)
            wrapped = DistributedDataParallel(model)
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(wrapped, batch(step)[2 * rank : 2 * rank + 2]).backward()
                optimizer.step()
            found[form, rounding] = {
                "bits": snapshot_of_named(model, optimizer),
                "weights": weights(model, optimizer),
                "winners": winners(optimizer),
            }
        for dtype in DTYPES:
            found[dtype] = [cut_state(rank, dtype, cut) for cut in (False, True)]
        found["skipped"] = skipped_part()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def cut_state(rank: int, dtype: torch.dtype, cut: bool) -> list[Tensor]:
    """Weights of a training by `AdamW`; with `cut` each process has a part of the state.

    After the first step a new optimizer goes on with the saved state.
    """

    def build_optimizer() -> torch.optim.Optimizer:
        if cut:
            return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=LR)
        return AdamW(model.parameters(), lr=LR)

    model = tiny_model(dtype)
    model.embed.requires_grad_(False)
    wrapped, optimizer = DistributedDataParallel(model), build_optimizer()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, batch(step)[2 * rank : 2 * rank + 2]).backward()
        optimizer.step()
        if step == 0:
            for receiver in range(2):
                if cut:
                    optimizer.consolidate_state_dict(to=receiver)
                if receiver == rank:
                    state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer()
            optimizer.load_state_dict(state)
    return [p.detach().clone() for p in model.parameters()]


def skipped_part() -> dict[str, bool]:
    """Whether each parameter stays in a step of `ZeroRedundancyOptimizer` with a NaN in one."""
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=AdamW, lr=LR, nonfinite="skip"
    )
    loss_of(model, batch(0)).backward()
    model.up.weight.grad[0, 0] = float("nan")
    optimizer.step()
    return {name: torch.equal(p, before[name]) for name, p in model.named_parameters()}


def snapshot_of_named(model: nn.Module, optimizer: AdamW) -> dict[str, object]:
    return copy.deepcopy(snapshot(model, optimizer))


def winners(optimizer: AdamW) -> dict[str, tuple[str, ...]]:
    routing = getattr(optimizer, "routing", {})
    return {name: decision.winners for name, decision in routing.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What both processes have come to."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    start_forked(train, (folder,), 2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("form", "rounding"), CASES)
def test_both_processes_have_the_same_bits(ranks, form, rounding):
    one, two = (found[form, rounding] for found in ranks)
    assert one["winners"] == two["winners"]
    assert bool(one["winners"]) == (form != "fft")
    assert one["bits"].keys() == two["bits"].keys()
    for key, value in one["bits"].items():
        same = torch.equal(value, two["bits"][key]) if torch.is_tensor(value) else True
        assert same, key
        assert torch.is_tensor(value) or value == two["bits"][key], key


@pytest.mark.parametrize(("form", "rounding"), CASES)
def test_as_one_process_with_the_joined_batch(ranks, form, rounding):
    """Up to the order in which gradients are averaged, and bfloat16 gradients are rounded."""
    model, optimizer = build(form, rounding or "float32", lr=LR, lora_lr=None)
    before = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
    found = ranks[0][form, rounding]
    near = 1e-5 if rounding is None else 0.3 * STEPS * LR
    if rounding is None:
        assert found["winners"] == winners(optimizer)
    distance = moved = 0.0
    for name, expected in weights(model, optimizer).items():
        if rounding is None:
            torch.testing.assert_close(found["weights"][name], expected, rtol=1e-4, atol=near)
        distance += (found["weights"][name] - expected).float().square().sum().item()
        moved += (expected.float() - before[name]).square().sum().item()
    assert moved > 0
    assert distance < 0.1 * moved


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_cut_by_zero_redundancy_optimizer_changes_no_bit(ranks, dtype):
    """With bfloat16, the low halves are cut, saved and loaded too."""
    for found in ranks:
        whole, cut = found[dtype]
        assert all(map(torch.equal, whole, cut))
        assert all(map(torch.equal, cut, ranks[0][dtype][1]))
        embed, up, *_ = map(torch.equal, cut, tiny_model(dtype).parameters())
        assert (embed, up) == (True, False)  # the embedding is frozen


def test_zero_redundancy_optimizer_skips_the_part_of_one_process(ranks):
    """Each process sees the gradients of its own part only."""
    for found in ranks:
        assert found["skipped"]["up.weight"]
        assert set(found["skipped"].values()) == {True, False}
        assert found["skipped"] == ranks[0]["skipped"]


def test_what_is_for_one_process_is_refused(ranks):
    """Also where the processes are started after the optimizer is built."""
    for found in ranks:
        for messages in (found["refused"], found["late"]):
            assert len(messages) == 2
            assert "optimizer_in_backward=True is not possible with 2 processes" in messages[0]
            assert "grad_accumulation_dtype='float32' is not possible with 2" in messages[1]
            assert not any("\n" in message for message in messages)
