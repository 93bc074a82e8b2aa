"""Whole steps of MoLFAdamW and AdamW through the kernels, beside the eager path and the twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarios import DEVICE
from torch import Tensor, nn

from core_helpers import (
    Conv1D,
    Pair,
    Rates,
    assert_same_bits,
    feed,
    snapshot,
)
from molf import AdamW, MoLFConfig
from molf.core.execute.triton import Kernels
from molf.core.execute.triton.executor import Triton
from molf.core.storage.rounding import RoundingKey, round_stochastic
from optimizer_forms import build

BF16 = torch.bfloat16
SEED = 5


class Stack(nn.Module):
    """Layers as Qwen2 has them and a transposed one, an embedding, a norm and a head."""

    def __init__(self, width: int = 50, inner: int = 70) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.q = nn.Linear(width, 16)
        self.gate = nn.Linear(width, inner, bias=False)  # more than a block, more than a tile
        self.down = nn.Linear(inner, 16, bias=False)
        self.turned = Conv1D(width, 8)
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(16, 7, bias=False)


def made(
    kernels: str | None,
    storage: str = "float32",
    *,
    form: str = "folded",
    model: Callable[[], nn.Module] = Stack,
    **options: Any,
) -> tuple[nn.Module, AdamW]:
    """The model, from weights that bfloat16 holds, and its optimizer."""
    options = {"seed": SEED, "weight_decay": 0.1, "lora_lr": None, "kernels": kernels, **options}
    return build(form, storage, model=lambda: model().to(BF16).to(DEVICE), **options)


def take_steps(model: nn.Module, optimizer: AdamW, seeds, accumulated: bool = False) -> list:
    """Steps from gradients that both precisions can hold; the decisions of each."""
    decisions = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator).to(BF16)
            parameter.grad = grad.to(DEVICE, torch.float32 if accumulated else parameter.dtype)
        optimizer.step()
        decisions.append(dict(getattr(optimizer, "routing", {})))
    return decisions


def values_of(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """The float32 values that the parameters stand for, by name."""
    exact = optimizer.float32_weights()
    return {n: exact.get(p, p).detach().float().clone() for n, p in model.named_parameters()}


def state_of(model: nn.Module, optimizer: AdamW) -> dict[str, object]:
    """Everything the state holds, values of weights instead of their halves."""
    found = {k: v for k, v in snapshot(model, optimizer).items() if not k.endswith("/low")}
    return found | values_of(model, optimizer)


def assert_close(got: dict[str, object], expected: dict[str, object], near: float) -> None:
    """Same keys, shapes and dtypes; numbers as near as the last bits of float32 allow."""
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert got[key].dtype == value.dtype
            scale = value.double().abs().max().item()
            torch.testing.assert_close(got[key], value, rtol=0, atol=near * scale, msg=key)
        else:
            assert got[key] == value, key


def assert_same_decisions(got: list, expected: list) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert list(mine) == list(other)
        for layer, decision in other.items():
            assert mine[layer].winners == decision.winners
            assert mine[layer].scores == pytest.approx(decision.scores, rel=1e-4)


ROUTING = {
    "epd": {},
    "pfn": {"score": "pfn", "top_k": 2},
    "random": {"score": "random", "top_k": 2},
}


# -- beside the eager path and the twin


@pytest.mark.parametrize("routing", ROUTING)
def test_float32_is_the_eager_path(routing):
    runs = []
    for kernels in ("triton", "eager"):
        model, optimizer = made(kernels, **ROUTING[routing], lora_lr=2e-2)
        decisions = take_steps(model, optimizer, range(2))
        runs.append((decisions, snapshot(model, optimizer)))
    assert_same_decisions(runs[0][0], runs[1][0])
    assert_close(runs[0][1], runs[1][1], near=2e-5)
    winners = {w for step in runs[0][0] for decision in step.values() for w in decision.winners}
    assert len(winners) >= {"epd": 1}.get(routing, 3)


@pytest.mark.parametrize(
    ("rounding", "accumulated"), [("exact", False), ("exact", True), ("nearest", False)]
)
def test_bfloat16_is_the_eager_path(rounding, accumulated):
    """Nearest: but for values that lie at a tie, whose last bit decides."""
    runs = []
    for kernels in ("triton", "eager"):
        options = {"grad_accumulation_dtype": "float32"} if accumulated else {}
        model, optimizer = made(kernels, rounding, top_k=2, **options)
        decisions = take_steps(model, optimizer, range(2), accumulated)
        if accumulated:
            assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        runs.append((decisions, state_of(model, optimizer)))
    assert_same_decisions(runs[0][0], runs[1][0])
    assert_close(runs[0][1], runs[1][1], near=2e-5 if rounding == "exact" else 2**-8)


def test_stochastic_rounding_draws_what_the_eager_path_would():
    """The same float32 results, from the same seed, names and counters: the same bits."""
    options = {"score": "random", "top_k": 2}
    model, optimizer = made("triton", **options)
    take_steps(model, optimizer, [0])
    results = values_of(model, optimizer)
    model, optimizer = made("triton", "stochastic", **options)
    take_steps(model, optimizer, [0])
    for name, parameter in model.named_parameters():
        seed = next(g["seed"] for g in optimizer.param_groups if name in g["param_names"])
        expected = round_stochastic(results[name], RoundingKey.of(seed, name, 1))
        assert torch.equal(parameter.view(torch.int16), expected.view(torch.int16)), name


@pytest.mark.parametrize(("score", "top_k"), [("epd", 1), ("pfn", 2), ("epd", 3)])
def test_the_twin_takes_the_same_path(score, top_k):
    torch.manual_seed(1)
    layers: dict[str, nn.Module] = {
        "plain": nn.Linear(24, 40, bias=False),
        "biased": nn.Linear(7, 13),
        "turned": Conv1D(24, 40),
    }
    layers = {name: layer.to(DEVICE) for name, layer in layers.items()}
    config = MoLFConfig(ranks=(3, 6), alpha=4.0, score=score, top_k=top_k)
    rates = Rates(1e-3, (1e-3, 3e-3), 0.1, (0.01, 0.02), (0.9, 0.95), 1e-8)
    pair = Pair(layers, config, rates, seed=1, kernels="triton")
    for factor in (1.0, 0.0, 0.5):
        grads = {}
        for name, layer in layers.items():
            weight = pair.weight(name)
            bias = None if layer.bias is None else torch.randn(len(weight)).double().to(DEVICE)
            grads[name] = torch.randn(weight.shape).double().to(DEVICE), bias
        pair.step(grads, factor, near=1e-4)
        for name, twin in pair.twins.items():
            error = (pair.weight(name).double() - twin.effective_weight()).abs().max()
            assert error <= 1e-6
            for (A, B), exact_A, exact_B in zip(
                pair.optimizer.lora_factors(name), twin.A, twin.B, strict=True
            ):
                assert (A - exact_A["value"]).abs().max() <= 1e-6
                assert (B - exact_B["value"]).abs().max() <= 1e-6


# -- what a step must not do


def test_what_kernels_cannot_have_is_found_before_anything_is_written():
    model, optimizer = made("triton", lr=1e-3)
    take_steps(model, optimizer, [0])
    before = snapshot(model, optimizer)
    feed(model, 1)
    model.gate.weight.grad = model.gate.weight.grad.t().contiguous().t()
    with pytest.raises(ValueError, match="Invalid gradient with strides"):
        optimizer.step()
    assert_same_bits(snapshot(model, optimizer), before)
    model.gate.weight.grad = None
    model.gate.weight.data = model.gate.weight.data.double()
    model.gate.weight.grad = torch.ones_like(model.gate.weight)
    with pytest.raises(ValueError, match=r"and gate\.weight is torch\.float64"):
        optimizer.step()
    model.gate.weight.data = model.gate.weight.data.float()
    assert_same_bits(snapshot(model, optimizer), before)


def test_a_weight_that_was_set_to_zero_does_not_become_a_nan():
    """Whatever its low half was: as the eager path, which counts it as zero below zero."""
    runs = []
    for kernels in ("triton", "eager"):
        model, optimizer = made(kernels, "exact", lr=1e-5)
        take_steps(model, optimizer, range(2))
        for parameter in model.parameters():
            low = optimizer.state[parameter]["low"]
            assert parameter.dim() < 2 or (low < 0).any()
            parameter.data.zero_()
            parameter.data.flatten()[::2] *= -1
        take_steps(model, optimizer, [2])
        runs.append(values_of(model, optimizer))
    assert all(value.isfinite().all() for value in runs[0].values())
    assert_close(*runs, near=2e-3)  # of steps at 1e-5; low halves themselves differ in last bits


# -- the state


def test_8bit_states_are_refused_when_they_are_loaded():
    _, optimizer = made("triton")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "8bit"
    with pytest.raises(ValueError, match="not possible with state_dtype='8bit'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["state_dtype"] == "float32"


def test_groups_that_are_added_are_checked():
    _, optimizer = made("triton", form="fft")
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"float64"):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(2).double()))]})
    assert len(optimizer.param_groups) == count


# -- around the step


def test_in_the_backward_pass():
    runs = []
    for in_backward in (False, True):
        model, optimizer = made("triton", model=Chain, optimizer_in_backward=in_backward)
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(3, 6, generator=generator).to(DEVICE)
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert set(optimizer.routing) == {"first", "second"}
        runs.append(snapshot(model, optimizer))
    assert_same_bits(*runs)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.norm = nn.LayerNorm(9)
        self.second = nn.Linear(9, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


@pytest.mark.parametrize("rounding", ["exact", "nearest"])
def test_what_rounding_loses_is_measured(rounding):
    found = []
    for kernels in ("triton", "eager"):
        model, optimizer = made(kernels, rounding, score="random", top_k=2, lr=3e-4)
        optimizer.measure_updates = True
        take_steps(model, optimizer, range(2))
        found.append(optimizer.update_fidelity)
    assert found[0] == pytest.approx(found[1], abs=0.01)
    assert (found[0].lost > 0.2) == (rounding == "nearest")


@pytest.mark.parametrize("form", ["folded", "fft"])
def test_autograd_sees_that_weights_have_moved(form):
    """A graph from before the step is no use any more, as after a step of any other optimizer."""
    model, optimizer = made("triton", form=form)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    losses = {name: x.square().sum() for name, x in model.named_parameters()}
    take_steps(model, optimizer, [0])
    moved = [n for n, x in model.named_parameters() if not torch.equal(x.detach(), before[n])]
    assert moved
    for name in moved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[name].backward()


def test_chunks_change_nothing():
    runs = []
    for size in (1, 5000, 64 << 20):
        model, optimizer = made("triton", score="random", top_k=2)
        optimizer.executor = Triton(size)
        take_steps(model, optimizer, [0])
        runs.append(snapshot(model, optimizer))
    assert_same_bits(runs[0], runs[2])
    assert_same_bits(runs[1], runs[2])


@pytest.mark.parametrize("score", ["full", "lora"])
def test_launches_and_reads_do_not_grow_with_the_layers(score, monkeypatch):
    launches, reads = [], []
    method = Tensor.tolist

    def counted_read(tensor: Tensor) -> list:
        reads.append(1)
        return method(tensor)

    def no_item(tensor: Tensor) -> None:
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(Kernels, "_launch", lambda self, kernel, *rest: launches.append(kernel))
    counts = []
    for layers in (2, 20):
        modules = [nn.Linear(16, 32) for _ in range(layers)] + [nn.LayerNorm(16)]
        model, optimizer = made("triton", model=lambda m=modules: nn.ModuleList(m), score=score)
        optimizer.executor = Triton(can_read=lambda device: False)  # as on a GPU
        launches.clear()
        reads.clear()
        feed(model, 0)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "tolist", counted_read)
            for name in ("item", "cpu", "numpy", "__bool__"):
                patch.setattr(Tensor, name, no_item)
            optimizer.step()
        counts.append((len(launches), len(reads)))
        assert len(optimizer.routing) == layers
    assert counts[0] == counts[1]
    assert counts[0][0] <= 14
    assert counts[0][1] == 1
