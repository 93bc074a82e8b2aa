"""Whole steps made of the fused operations, against the reference twin (molf.core.reference)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from scenarios import DEVICE, Source
from torch import Tensor

from core_helpers import Rates, Twin
from molf.core.arithmetic.adam import AdamWStep
from molf.core.arithmetic.weight_step import Product
from molf.core.config import MoLFConfig
from molf.core.execute.triton import AdamW, Kernels, LowRank, Moments, Weight
from molf.core.step.operations import FactorWrite, Operand
from molf.core.storage.rounding import join_float32, split_float32

BETAS, EPS = (0.9, 0.99), 1e-6
LR, LORA_LR = 1e-2, 2e-2
DECAY, LORA_DECAY = 0.1, 0.05
RANKS, SCALINGS = (2, 3), (0.7, 1.3)
ONE_A, ONE_B = slice(0, 2), slice(2, 5)


@dataclass
class Layer:
    """One routed layer as the folded optimizer keeps it."""

    weight: Weight
    transposed: bool
    bias: Tensor | None
    factor_a: Tensor
    factor_b: Tensor
    state: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weight", "bias", "factor_a", "factor_b"):
            tensor = self.weight.values if name == "weight" else getattr(self, name)
            if tensor is not None:
                zeros = torch.zeros_like(tensor, dtype=torch.float32)
                self.state[name] = zeros, zeros.clone()

    def effective(self) -> Tensor:
        stored = self.weight
        whole = join_float32(stored.values, stored.low) if stored.low is not None else stored.values
        return whole.t() if self.transposed else whole


def make_layer(shape: tuple[int, int], source: Source, kind: str, storage: str) -> Layer:
    out_features, in_features = shape
    weight = source.normal(out_features, in_features)
    weight = weight.t().contiguous() if kind == "transposed" else weight
    return Layer(
        Weight(*split_float32(weight)) if storage == "exact" else Weight(weight),
        kind == "transposed",
        source.normal(out_features) if kind == "bias" else None,
        source.normal(sum(RANKS), in_features),
        0.3 * source.normal(out_features, sum(RANKS)),
    )


def make_twin(layer: Layer, score: str, top_k: int) -> Twin:
    A, B = layer.factor_a.double(), layer.factor_b.double()
    factors = [(A[own], B[:, own]) for own in (ONE_A, ONE_B)]
    W, parts = layer.effective().double(), zip(SCALINGS, factors, strict=True)
    config = MoLFConfig(
        ranks=RANKS,
        alpha=[s * rank for s, rank in zip(SCALINGS, RANKS, strict=True)],
        use_rslora=False,
        score=score,
        top_k=top_k,
    )
    rates = Rates(LR, (LORA_LR, LORA_LR), DECAY, (LORA_DECAY, LORA_DECAY), BETAS, EPS)
    bias = None if layer.bias is None else layer.bias.double()
    return Twin(W - sum(s * b @ a for s, (a, b) in parts), factors, config, rates, bias)


def take_step(
    kernels: Kernels,
    layers: list[Layer],
    grads: list[tuple[Tensor, Tensor | None]],
    winners: list[tuple[int, ...]],
    t: int,
    score: str,
) -> list[list[float]]:
    """One optimizer step of all layers: five calls of kernels, however many layers there are."""
    dense = [
        G.t().contiguous() if layer.transposed else G
        for layer, (G, _) in zip(layers, grads, strict=True)
    ]
    biases = [grad for _, grad in grads if grad is not None]
    finite = kernels.squares([*dense, *biases]).isfinite().all()

    items, owners = [], []
    for number, (layer, grad, (G, grad_bias)) in enumerate(zip(layers, dense, grads, strict=True)):
        state = layer.state
        items.append(Moments(grad, *state["weight"], BETAS))
        owners.append((number, 0))
        if layer.bias is not None:
            items.append(Moments(grad_bias, *state["bias"], BETAS))
            owners.append((number, 0))
        for index, (own, s) in enumerate(zip((ONE_A, ONE_B), SCALINGS, strict=True)):
            grad_A = s * layer.factor_b[:, own].t() @ G.float()
            grad_B = s * G.float() @ layer.factor_a[own].t()
            items.append(Moments(grad_A, *(m[own] for m in state["factor_a"]), BETAS))
            items.append(Moments(grad_B, *(m[:, own] for m in state["factor_b"]), BETAS))
            owners += [(number, index + 1)] * 2
    totals = kernels.moments(items, finite, "norm" if score == "pfn" else "descent").tolist()

    sums = [[0.0] * 3 for _ in layers]
    counts = [[0] * 3 for _ in layers]
    for item, total, (number, expert) in zip(items, totals, owners, strict=True):
        sums[number][expert] += total
        counts[number][expert] += item.grad.numel()
    lrs = (LR, LORA_LR, LORA_LR)
    scores = [
        [
            (total / n) ** 0.5 if score == "pfn" else lr * total / n
            for total, n, lr in zip(of_layer, of_counts, lrs, strict=True)
        ]
        for of_layer, of_counts in zip(sums, counts, strict=True)
    ]

    factors, weights, plain = [], [], []
    dense_step = AdamWStep(LR, DECAY, BETAS, EPS, t)
    lora_step = AdamWStep(LORA_LR, LORA_DECAY, BETAS, EPS, t)
    for layer, won in zip(layers, winners, strict=True):
        decay = dense_step.decay if 0 in won else 0.0
        left, right = [], []
        for index, (own, s) in enumerate(zip((ONE_A, ONE_B), SCALINGS, strict=True)):
            A, B, rank = layer.factor_a[own], layer.factor_b[:, own], RANKS[index]
            if index + 1 in won:
                part_left = B.new_empty(len(B), 2 * rank)
                part_right = A.new_empty(2 * rank, A.shape[1])
                of_B = Operand(part_left[:, :rank], 0.0, s), Operand(part_left[:, rank:], s, 0.0)
                of_A = Operand(part_right[:rank], 1.0, 1.0), Operand(part_right[rank:], decay, 1.0)
                moments_A = (m[own] for m in layer.state["factor_a"])
                moments_B = (m[:, own] for m in layer.state["factor_b"])
                factors.append(FactorWrite(B, *moments_B, lora_step, of_B))
                factors.append(FactorWrite(A, *moments_A, lora_step, of_A))
                left.append(part_left)
                right.append(part_right)
            elif decay:
                left.append(decay * s * B)
                right.append(A.clone())
        full = (*layer.state["weight"], dense_step) if 0 in won else None
        weights.append((layer, left, right, full))
        if 0 in won and layer.bias is not None:
            step = AdamWStep(LR, 0.0, BETAS, EPS, t)
            plain.append(AdamW(Weight(layer.bias), *layer.state["bias"], step))
    kernels.factors(factors, finite)
    products = []
    for layer, left, right, full in weights:
        operands = torch.cat(left, 1), torch.cat(right, 0)
        if layer.transposed:
            operands = operands[1].t(), operands[0].t()
        products.append(LowRank(layer.weight, Product(*operands, 1.0), full))
    kernels.low_rank(products, finite)
    kernels.adamw(plain, finite)
    return scores


@pytest.mark.parametrize(
    ("score", "top_k", "storage"),
    [("epd", 1, "float32"), ("epd", 1, "exact"), ("pfn", 2, "exact"), ("epd", 3, "float32")],
)
def test_the_twin_takes_the_same_path(score, top_k, storage):
    """Every set of winners comes to every layer: which one wins is not the kernels' business."""
    source = Source(top_k)
    kernels = Kernels(DEVICE)
    shapes = [(13, 7, "bias"), (5, 70, "transposed"), (1, 1, "plain"), (16, 16, "bias")]
    layers = [make_layer((out, in_), source, kind, storage) for out, in_, kind in shapes]
    twins = [make_twin(layer, score, top_k) for layer in layers]
    sets = list(itertools.combinations(range(3), top_k))
    for t in range(1, 4):
        grads = [
            (source.normal(out, in_), source.normal(out) if kind == "bias" else None)
            for out, in_, kind in shapes
        ]
        winners = [sets[(t + number) % len(sets)] for number in range(len(layers))]
        expected = [
            twin.step(G.double(), None if b is None else b.double(), winners=forced)
            for twin, (G, b), forced in zip(twins, grads, winners, strict=True)
        ]
        scores = take_step(kernels, layers, grads, winners, t, score)
        for got, decision in zip(scores, expected, strict=True):
            assert got == pytest.approx(decision.scores, rel=2e-5)
        for layer, twin in zip(layers, twins, strict=True):
            assert_same_layer(layer, twin)


def assert_same_layer(layer: Layer, twin: Twin) -> None:
    def near(got: Tensor, exact: Tensor) -> None:
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    near(layer.effective(), twin.effective_weight())
    if layer.bias is not None:
        near(layer.bias, twin.b["value"])
    for own, A, B in zip((ONE_A, ONE_B), twin.A, twin.B, strict=True):
        near(layer.factor_a[own], A["value"])
        near(layer.factor_b[:, own], B["value"])
        for name, moments in (("factor_a", A), ("factor_b", B)):
            place = own if name == "factor_a" else (slice(None), own)
            near(layer.state[name][0][place], moments["m"])
            near(layer.state[name][1][place], moments["v"])
