"""The fast step against its slow, literal twin (`molf.core.reference`), over random layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core_helpers import Conv1D, Pair, Rates
from molf.core.arithmetic.blocks import Blocks
from molf.core.config import MoLFConfig
from molf.core.execute.eager import Eager
from reference_scores import FURTHER

STEPS = 8
SIZES = st.sampled_from((1, 2, 3, 5, 8))
DECAYS = st.sampled_from((0.0, 0.01, 0.3))


@st.composite
def configs(draw) -> MoLFConfig:
    ranks = draw(st.lists(st.sampled_from((1, 2, 4, 7)), min_size=1, max_size=3))
    score = draw(st.sampled_from(("epd", "epd", "pfn", *FURTHER, "random", "full", "lora")))
    most = {"full": 1, "lora": len(ranks)}.get(score, len(ranks) + 1)
    alpha = st.sampled_from((0.5, 4.0, 16.0))
    return MoLFConfig(
        ranks=ranks,
        alpha=draw(st.one_of(alpha, st.tuples(*[alpha] * len(ranks)))),
        use_rslora=draw(st.booleans()),
        score=score,
        top_k=draw(st.integers(1, most)),
    )


@st.composite
def cases(draw, dtype: torch.dtype) -> tuple[Pair, list, list]:
    """A pair, the gradients of every step, and what the schedule multiplies the rates by."""
    config = draw(configs())
    count = len(config.ranks)
    lr = draw(st.sampled_from((1e-3, 3e-2)))
    ratios = draw(st.tuples(*[st.sampled_from((0.0, 0.3, 1.0, 7.0))] * count))
    rates = Rates(
        lr=lr,
        lora_lrs=tuple(lr * ratio for ratio in ratios),
        weight_decay=draw(DECAYS),
        lora_weight_decays=draw(st.tuples(*[DECAYS] * count)),
        betas=draw(st.sampled_from(((0.9, 0.999), (0.0, 0.95), (0.85, 0.9)))),
        eps=draw(st.sampled_from((1e-8, 1e-3))),
    )
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    layers: dict[str, nn.Module] = {}
    for index in range(draw(st.integers(1, 2))):
        out_features, in_features = draw(SIZES), draw(SIZES)
        kind = draw(st.sampled_from(("bias", "plain", "transposed")))
        if kind == "transposed":
            layer: nn.Module = Conv1D(out_features, in_features)
        else:
            layer = nn.Linear(in_features, out_features, bias=kind == "bias")
        layers[f"layer_{index}"] = layer.to(dtype)
    pair = Pair(layers, config, rates, draw(st.sampled_from((None, seed))))

    scale = draw(st.sampled_from((1e-4, 1.0, 30.0)))
    factors = draw(st.lists(st.sampled_from((0.0, 0.1, 0.7, 1.0)), min_size=STEPS, max_size=STEPS))
    missing = draw(st.lists(st.sampled_from("wb......"), min_size=STEPS, max_size=STEPS))
    grads = [random_grads(layers, dtype, scale, what) for what in missing]
    return pair, grads, factors


def random_grads(layers, dtype: torch.dtype, scale: float, missing: str = ".") -> dict:
    """Gradients of every layer, exact in `dtype`; `missing`: the first layer lacks w or b."""
    found = {}
    for index, (name, layer) in enumerate(layers.items()):
        rows, columns = (
            reversed(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.weight.shape)
        )
        grad = (torch.randn(rows, columns, dtype=torch.float64) * scale).to(dtype).double()
        grad_bias = (torch.randn(rows, dtype=torch.float64) * scale).to(dtype).double()
        lacks_bias = layer.bias is None or (missing == "b" and index == 0)
        found[name] = (grad, None if lacks_bias else grad_bias)
        if missing == "w" and index == 0:
            found[name] = None
    return found


def check_equal(pair: Pair, relative: float) -> None:
    """Compare weights, biases, factors and all moments with the twins'."""
    for name, twin in pair.twins.items():
        module, layer_state = pair.layers[name], pair.optimizer.state[pair.layers[name].weight]
        got = {"W_eff": pair.weight(name)}
        expected = {"W_eff": twin.effective_weight()}
        if module.bias is not None:
            got["b"], expected["b"] = module.bias.detach(), twin.b["value"]
        for i, (A, B) in enumerate(pair.optimizer.lora_factors(name)):
            got[f"A{i}"], expected[f"A{i}"] = A, twin.A[i]["value"]
            got[f"B{i}"], expected[f"B{i}"] = B, twin.B[i]["value"]
        if layer_state:
            for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
                dense = layer_state[key]
                got[moment] = dense.t() if isinstance(module, Conv1D) else dense
                expected[moment] = twin.W[moment]
                got[f"A_{moment}"] = layer_state[f"lora_A_{key}"]
                expected[f"A_{moment}"] = torch.cat([A[moment] for A in twin.A], 0)
                got[f"B_{moment}"] = layer_state[f"lora_B_{key}"]
                expected[f"B_{moment}"] = torch.cat([B[moment] for B in twin.B], 1)
        for key, value in expected.items():
            error = (got[key].double() - value).abs().max()
            limit = relative * value.abs().max()
            assert error <= limit, f"{name} {key}: {error} > {limit}"


def check_scores(decisions, relative: float) -> None:
    for name, (expected, scores) in decisions.items():
        assert scores == pytest.approx(expected.scores, rel=relative, abs=1e-30), name


@pytest.mark.parametrize("block", [4, 32_768])
@settings(max_examples=60)
@given(case=cases(torch.float64))
def test_float64_follows_the_twin(case, block):
    pair, grads, factors = case
    pair.optimizer.executor = Eager(Blocks(cpu_elements=block))
    for grad, factor in zip(grads, factors, strict=True):
        check_scores(pair.step(grad, factor, near=1e-10), relative=1e-10)
        check_equal(pair, relative=1e-12)


@settings(max_examples=60)
@given(case=cases(torch.float32))
def test_float32_follows_the_twin_within_its_rounding(case):
    pair, grads, factors = case
    for grad, factor in zip(grads, factors, strict=True):
        check_scores(pair.step(grad, factor, near=1e-4), relative=1e-4)
        check_equal(pair, relative=2e-5)


@pytest.mark.parametrize("score", ["epd", "pfn"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_bfloat16_weights_are_rounded_once_per_step(score, top_k):
    torch.manual_seed(0)
    layers = {"plain": nn.Linear(24, 40), "transposed": Conv1D(24, 40)}
    layers = {name: layer.to(torch.bfloat16) for name, layer in layers.items()}
    config = MoLFConfig(ranks=(3, 6), alpha=4.0, score=score, top_k=top_k)
    rates = Rates(1e-3, (1e-3, 3e-3), 0.1, (0.01, 0.02), (0.9, 0.95), 1e-8)
    pair = Pair(layers, config, rates, seed=1, weight_rounding="nearest")
    for _ in range(10):
        pair.step(random_grads(layers, torch.bfloat16, 1.0), 1.0, near=1e-4)
        for name, twin in pair.twins.items():
            exact, stored = twin.effective_weight(), pair.weight(name).double()
            best = (exact.bfloat16().double() - exact).abs()
            # The nearest bfloat16 of the exact value, up to float32's error at a tie.
            assert ((stored - exact).abs() <= best + 1e-5 * exact.abs().max()).all()
            twin.set_effective_weight(stored)
            if twin.b is not None:
                bias = pair.layers[name].bias.detach().double()
                assert (twin.b["value"] - bias).abs().max() <= 2**-8 * bias.abs().max()
                twin.b["value"] = bias
        state = pair.optimizer.state[layers["plain"].weight]
        assert {v.dtype for k, v in state.items() if k != "step"} == {torch.float32}


def test_weights_larger_than_a_block_follow_the_twin():
    torch.manual_seed(0)
    layers = {"a": nn.Linear(300, 170).double(), "b": Conv1D(129, 300).double()}
    config = MoLFConfig(ranks=(4, 16), alpha=8.0, top_k=2)
    rates = Rates(1e-3, (1e-3, 2e-3), 0.1, (0.01, 0.02), (0.9, 0.999), 1e-8)
    pair = Pair(layers, config, rates, seed=1)
    for _ in range(3):
        check_scores(pair.step(random_grads(layers, torch.float64, 1.0), 1.0, 1e-10), 1e-10)
        check_equal(pair, relative=1e-12)


def test_gradients_that_vanish_exactly_do_not_count_for_more_than_zero():
    layers = {"a": nn.Linear(4, 3).double()}
    config = MoLFConfig(ranks=(2,), alpha=2.0)
    rates = Rates(1e-2, (1e-2,), 0.1, (0.01,), (0.9, 0.999), 1e-8)
    pair = Pair(layers, config, rates, seed=None)
    for step in range(4):
        grad = torch.zeros(3, 4, dtype=torch.float64)
        grad[0, step % 2] = 1e-3
        pair.step({"a": (grad, torch.zeros(3, dtype=torch.float64))}, 1.0, near=1e-10)
        check_equal(pair, relative=1e-12)
