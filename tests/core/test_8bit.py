"""Moments in blocks of 8 bits: how close, how they are stored, and what they do not touch."""

from __future__ import annotations

import copy
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchao.optim.subclass_8bit import OptimState8bit

from core_helpers import Conv1D, assert_same_bits, feed, snapshot
from molf import AdamW, MoLFAdamW, MoLFConfig
from molf.core.arithmetic import adam
from molf.core.arithmetic.adam import MomentDecay
from molf.core.arithmetic.blocks import BLOCKS, Blocks
from molf.core.execute.eager import Eager
from molf.core.storage import moments
from molf.core.storage.moments import EightBitMoments, _map, moment_state, moments_of
from optimizer_forms import build


class Layers(nn.Module):
    """Large enough, in both layouts, with rows of one or several blocks; too small; too odd."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.large = nn.Linear(384, 128)
        self.turned = Conv1D(128, 64)
        self.small = nn.Linear(32, 32)
        self.own = nn.Linear(67, 67, bias=False)
        self.odd = nn.Linear(2 * 37, 64, bias=False)  # 37 and 74: one block of 74
        self.prime = nn.Linear(257, 32, bias=False)


BLOCKS_OF = {
    "embed.weight": 64,
    "large.weight": 192,
    "turned.weight": 128,
    "own.weight": 67,
    "odd.weight": 74,
}
LARGE = set(BLOCKS_OF)


made = partial(build, model=Layers, lr=1e-3, lora_lr=None, weight_decay=0.1)


def take(model, optimizer, steps) -> None:
    for step in steps:
        feed(model, step, scale=1e-2)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_scales_are_float32_whatever_the_default_dtype(dtype):
    """float16 holds no scale of second moments."""
    weights = [nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    default = torch.get_default_dtype()
    for weight, own in zip(weights, (default, dtype), strict=True):
        optimizer = AdamW([weight], state_dtype="8bit")
        weight.grad = torch.full_like(weight, 1e-3)
        torch.set_default_dtype(own)
        try:
            optimizer.step()
            optimizer.step()
        finally:
            torch.set_default_dtype(default)
        assert optimizer.state[weight]["exp_avg_sq_scales"].dtype == torch.float32
    assert torch.equal(*weights)


@pytest.mark.parametrize("form", ["folded-top2", "fft"])
@pytest.mark.parametrize("storage", ["float32 8bit", "8bit"])
def test_large_tensors_have_8bit_moments_and_the_rest_float32(form, storage):
    model, optimizer = made(form, storage)
    take(model, optimizer, range(2))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert ("exp_avg_codes" in state) == (name in LARGE), name
        assert ("exp_avg" in state) == (name not in LARGE), name
        if name not in LARGE:
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            codes, scales = state[f"{key}_codes"], state[f"{key}_scales"]
            assert (codes.dtype, codes.shape) == (torch.uint8, parameter.shape)
            rows = len(parameter), parameter.shape[1] // BLOCKS_OF[name]
            assert (scales.dtype, scales.shape) == (torch.float32, rows)
            assert type(codes) is type(scales) is Tensor
    if form != "fft":
        factors = {
            k: v.dtype for k, v in optimizer.state[model.large.weight].items() if "lora" in k
        }
        assert len(factors) == 6
        assert set(factors.values()) == {torch.float32}


def test_state_is_a_quarter_of_float32s():
    sizes = []
    for state_dtype in ("float32", "8bit"):
        weight = nn.Parameter(torch.randn(256, 256))
        optimizer = AdamW([weight], state_dtype=state_dtype)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        tensors = [v for v in optimizer.state[weight].values() if torch.is_tensor(v)]
        sizes.append(sum(v.numel() * v.element_size() for v in tensors) / weight.numel())
    assert sizes == [8.0, 2 + 2 * 4 / 256]


@pytest.mark.parametrize("form", ["folded-top2", "fft"])
def test_steps_use_float32_moments_and_storing_them_is_torchaos(form):
    """One step from zero moments loses nothing; what it leaves is torchao's own rounding."""
    model, optimizer = made(form, "float32 8bit")
    twin, reference = made(form)
    for each, its in ((model, optimizer), (twin, reference)):
        take(each, its, [0])
    if form != "fft":
        for layer, decision in optimizer.routing.items():
            expected = reference.routing[layer]
            assert decision.winners == expected.winners
            assert decision.scores == pytest.approx(expected.scores, rel=1e-6)
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name
        if name not in LARGE:
            continue
        state, exact = optimizer.state[one], reference.state[other]
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            stored = OptimState8bit.zeros(one.shape, signed, BLOCKS_OF[name])
            stored.copy_(exact[key])
            assert torch.equal(state[f"{key}_scales"].view(-1), stored.scale)
            expected = stored.codes
            if not signed:
                expected = expected.maximum((exact[key] > 0).to(torch.uint8))
            assert torch.equal(state[f"{key}_codes"], expected)


@pytest.mark.parametrize("form", ["folded-top2", "fft"])
def test_training_stays_close_to_float32_moments(form):
    model, optimizer = made(form, "float32 8bit")
    twin, reference = made(form)
    start = copy.deepcopy(model)
    for each, its in ((model, optimizer), (twin, reference)):
        take(each, its, range(60))
    moved = []
    for each in (model, twin):
        pairs = zip(each.parameters(), start.parameters(), strict=True)
        moved.append(torch.cat([(p - q).detach().flatten() for p, q in pairs]))
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.98
    assert 0.9 < moved[0].norm() / moved[1].norm() < 1.1


def test_small_second_moments_are_not_stored_as_zero():
    """Where one element's gradients dwarf the others', which then stop: m / (sqrt(0) + eps)."""
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = AdamW([weight], lr=1e-3, weight_decay=0.0, state_dtype="8bit")
    for step in range(6):
        weight.grad = torch.full_like(weight, 1e-5 if step < 3 else 0.0)
        weight.grad[:, 0] = 1.0
        optimizer.step()
    codes = optimizer.state[weight]["exp_avg_sq_codes"]
    assert (codes > 0).all()
    assert weight.abs().max() < 6 * 1.1e-3


@pytest.mark.parametrize("elements", [256, 4096, 20_000])
def test_blocks_of_rows_change_nothing(elements):
    ends = []
    for size in (32_768, elements):
        model, optimizer = made("fft", "float32 8bit")
        optimizer.executor = Eager(Blocks(cpu_elements=size))
        take(model, optimizer, range(3))
        ends.append(snapshot(model, optimizer))
    assert_same_bits(*ends)


@pytest.mark.parametrize("form", ["folded-top2", "fft"])
def test_no_transient_has_the_size_of_a_weight(form, monkeypatch):
    """Steps stay in blocks: largest float32 tensor that dequantising makes."""
    weight = nn.Linear(512, 2048, bias=False)
    config = MoLFConfig(ranks=(2,))
    if form != "fft":
        optimizer = MoLFAdamW.from_model(weight, config, state_dtype="8bit")
    else:
        optimizer = AdamW(weight.parameters(), state_dtype="8bit")
    seen = []
    load = EightBitMoments.load
    monkeypatch.setattr(
        EightBitMoments,
        "load",
        lambda self, rows: (block := load(self, rows), seen.append(block[0].numel()))[0],
    )
    feed(weight, 0)
    optimizer.step()
    assert 0 < max(seen) <= BLOCKS.cpu_elements * torch.get_num_threads()


@pytest.mark.parametrize("form", ["folded", "explicit"])
def test_losers_moments_move_in_8bit_too(form):
    """Folded, the weight is written for the LoRA expert that wins; explicit, it is not."""
    layer = nn.Linear(64, 64, bias=False)
    options = {"ranks": (2,), "score": "lora", "weight_decay": 0.0}
    model, optimizer = build(form, "float32 8bit", model=lambda: nn.Sequential(layer), **options)
    reference = {"exp_avg": torch.zeros(64, 64), "exp_avg_sq": torch.zeros(64, 64)}
    decay = MomentDecay.of((0.9, 0.999), torch.tensor(True), torch.float32)
    for step in range(2):
        feed(model, step)
        adam.update_moments(layer.weight.grad, *reference.values(), decay)
        optimizer.step()
    rows = slice(0, 64)
    stored = EightBitMoments(optimizer.state[layer.weight])
    got = [block.dequantize() for block in stored._blocks(rows)]
    torch.testing.assert_close(got[0], reference["exp_avg"], atol=2e-2, rtol=0.1)
    torch.testing.assert_close(got[1].sqrt(), reference["exp_avg_sq"].sqrt(), atol=1e-2, rtol=0.1)


def test_unknown_format_is_refused():
    with pytest.raises(
        ValueError, match=r"Invalid state_dtype='4bit'\. Must be 'float32' or '8bit'"
    ):
        made("fft", state_dtype="4bit")


@pytest.mark.parametrize("form", ["folded-top2", "fft"])
def test_missing_torchao_names_the_extra(form, monkeypatch):
    moments._torchao.cache_clear()
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"pip install 'molf\[torchao\]'"):
        made(form, "float32 8bit")
    made(form)


def test_nothing_large_enough_is_warned_of():
    with pytest.warns(UserWarning, match="changes nothing"):
        AdamW(nn.Linear(8, 8).parameters(), state_dtype="8bit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made("fft", "float32 8bit")


def test_float64_moments_stay_float64():
    assert moment_state(torch.zeros(64, 64).double(), "8bit")["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize("shape", [(8, 512), (64, 64), (16, 384), (4096,)], ids=str)
def test_states_with_flat_scales_are_converted(shape):
    """Older states have one scale for each 256 numbers, whatever the length of a row."""
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = AdamW([parameter], state_dtype="8bit")
    exact = {"exp_avg": torch.randn(shape), "exp_avg_sq": torch.rand(shape)}
    old: dict = {"step": 3}
    for key, is_signed in (("exp_avg", True), ("exp_avg_sq", False)):
        stored = OptimState8bit.zeros(shape, is_signed)
        stored.copy_(exact[key])
        old[f"{key}_codes"], old[f"{key}_scales"] = stored.codes, stored.scale
    before = copy.deepcopy(old)
    saved = optimizer.state_dict()
    saved["state"] = {0: old}
    optimizer.load_state_dict(saved)
    assert_same_bits(old, before)  # the given state is not changed
    state = optimizer.state[parameter]
    if len(shape) == 1:
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    else:
        assert state["exp_avg_scales"].shape[0] == shape[0]
    moments = moments_of(state).load(... if len(shape) == 1 else slice(0, shape[0]))
    for (key, is_signed), got in zip(
        (("exp_avg", True), ("exp_avg_sq", False)), moments, strict=True
    ):
        stored = OptimState8bit(
            before[f"{key}_codes"],
            before[f"{key}_scales"],
            _map(is_signed, parameter.device),
            is_signed,
        )
        expected = stored.dequantize()
        if shape[-1] % 256 == 0 or len(shape) == 1:
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=0.1, atol=0.02)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 4
