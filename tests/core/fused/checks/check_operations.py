"""Each operation against float64 formulas and the eager arithmetic of molf.core.arithmetic.adam."""

from __future__ import annotations

import math

import pytest
import torch
from scenarios import (
    BETAS,
    DEVICE,
    GRADS,
    INTERPRETED,
    STEP,
    Source,
    adamw_items,
    factor_items,
    low_rank_items,
    moments_items,
)
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep, MomentDecay, update_moments
from molf.core.arithmetic.weight_step import Product
from molf.core.execute.triton import AdamW, Kernels, LowRank, Moments, Weight

YES = torch.ones((), dtype=torch.bool, device=DEVICE)
NO = torch.zeros((), dtype=torch.bool, device=DEVICE)
ULPS = 4 * 2**-24  # a few roundings of float32
FLOATS = [torch.float32, torch.bfloat16]


@pytest.fixture
def kernels() -> Kernels:
    return Kernels(DEVICE)


def assert_near(got: Tensor, exact: Tensor, scale: Tensor) -> None:
    """Within a few units in the last place of `scale`, the size of what was added."""
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= ULPS * scale.double()).all()


def tensors_of(item) -> list[Tensor]:
    """Every tensor of an item, whatever its depth."""
    if isinstance(item, Tensor):
        return [item]
    return [t for part in item for t in tensors_of(part)] if isinstance(item, tuple) else []


def same_bits(one: Tensor, two: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(kind), two.contiguous().view(kind))


def exact_moments(item: Moments | AdamW) -> tuple[Tensor, Tensor]:
    grad, (b1, b2) = item.grad.double(), item.betas
    exp_avg = b1 * item.exp_avg.double() + (1 - b1) * grad
    return exp_avg, b2 * item.exp_avg_sq.double() + (1 - b2) * grad.square()


def exact_descent(exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    return STEP.step_size * exp_avg / (exp_avg_sq.sqrt() / STEP.correction + STEP.eps)


# -- sums of squares, of which the guard is made


@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_of_squares(kernels, dtype):
    grads = [item.grad for item in moments_items(dtype, Source(1))]
    squares = kernels.squares(grads)
    expected = torch.stack([grad.double().square().sum() for grad in grads])
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0.0)
    spoilt = {0: float("nan"), len(grads) - 1: float("inf"), 2: -float("inf"), 1: 1e25}
    for place, value in spoilt.items():
        grads[place][..., -1] = value
    squares = kernels.squares(grads)
    for place, total in enumerate(squares.tolist()):
        assert math.isfinite(total) == (place not in spoilt)


@pytest.mark.parametrize("dtype", FLOATS)
def test_squares_of_extreme_gradients(kernels, dtype):
    limits = torch.finfo(dtype)
    values = [limits.tiny, limits.smallest_normal / 2, 0.0, -0.0, 1e17, -1e17]
    grad = torch.tensor(values, dtype=dtype, device=DEVICE).repeat(500)
    total = kernels.squares([grad]).item()
    assert total == pytest.approx(grad.double().square().sum().item(), rel=1e-6)
    assert math.isfinite(total)


# -- moments and scores


@pytest.mark.parametrize("term", ["descent", "norm"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_and_score_sums(kernels, dtype, term):
    items = moments_items(dtype, Source(2))
    expected = [exact_moments(item) for item in items]
    scales = [(abs(item.exp_avg) + abs(item.grad)).clone() for item in items]
    grads = [item.grad.clone() for item in items]
    totals = kernels.moments(items, YES, term)
    assert totals.dtype == torch.float64
    for item, (exp_avg, exp_avg_sq), scale in zip(items, expected, scales, strict=True):
        assert_near(item.exp_avg, exp_avg, scale)
        assert_near(item.exp_avg_sq, exp_avg_sq, exp_avg_sq)
    for item, grad, total in zip(items, grads, totals.tolist(), strict=True):
        assert torch.equal(item.grad, grad)
        root = item.exp_avg_sq.double().sqrt() + 1e-8
        exact = item.exp_avg.double() ** 2 / (root if term == "descent" else root**2)
        assert total == pytest.approx(exact.sum().item(), rel=1e-6)


def test_moments_are_those_of_the_eager_path(kernels):
    items = moments_items(torch.float32, Source(3))
    eager = [(item.exp_avg.clone(), item.exp_avg_sq.clone()) for item in items]
    for _ in range(3):
        kernels.moments(items, YES, "descent")
        for item, (exp_avg, exp_avg_sq) in zip(items, eager, strict=True):
            decay = MomentDecay.of(item.betas, YES, torch.float32)
            update_moments(item.grad, exp_avg, exp_avg_sq, decay)
    for item, (exp_avg, exp_avg_sq) in zip(items, eager, strict=True):
        torch.testing.assert_close(item.exp_avg, exp_avg, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(item.exp_avg_sq, exp_avg_sq, rtol=1e-6, atol=0)


def test_without_momentum_the_first_moment_is_the_gradient(kernels):
    source = Source(4)
    item = Moments(1e-6 * source.normal(33), *source.moments(33), (0.0, 0.9))
    kernels.moments([item], YES, "descent")
    assert same_bits(item.exp_avg, item.grad)


def test_zero_moments_score_zero(kernels):
    zeros = [torch.zeros(50, device=DEVICE) for _ in range(3)]
    assert kernels.moments([Moments(*zeros, BETAS)], YES, "norm").tolist() == [0]


def test_experts_that_share_stacked_factors_are_scored_apart(kernels):
    """Rows of A and columns of B belong to experts; together they are the whole."""
    source = Source(5)
    whole = Moments(source.normal(40, 6), *source.moments(40, 6), BETAS)
    parts = [tuple(t.clone() for t in whole[:3]) for _ in range(2)]
    by_column = [Moments(*(t[:, s] for t in parts[0]), BETAS) for s in (slice(2), slice(2, 6))]
    by_row = [Moments(*(t[s] for t in parts[1]), BETAS) for s in (slice(7), slice(7, 40))]
    total = kernels.moments([whole], YES, "descent").item()
    for split, stacked in ((by_column, parts[0]), (by_row, parts[1])):
        sums = kernels.moments(split, YES, "descent").tolist()
        assert sum(sums) == pytest.approx(total, rel=1e-6)
        assert torch.equal(stacked[1], whole.exp_avg)
        assert torch.equal(stacked[2], whole.exp_avg_sq)


def test_a_sum_has_the_same_bits_in_every_run_and_company(kernels):
    sums = []
    for company in ((0, 1, 2, 3, 4), (0, 1, 2, 3, 4), (2,), (3, 2)):
        items = moments_items(torch.float32, Source(6))
        totals = kernels.moments([items[i] for i in company], YES, "descent")
        sums.append(totals[company.index(2)].item())
    assert len(set(sums)) == 1


def test_sum_over_blocks_is_in_float64(kernels):
    """2^35 + 2048 does not exist in float32: three further blocks would be rounded away."""
    terms = torch.ones(4 * 2048, device=DEVICE)
    terms[:2048] = 2.0**24
    # b1 = 0.5 halves m, b2 = 1 keeps v at 1, and 1e-8 rounds away beside 1: PFN's terms are exact.
    item = Moments(torch.zeros_like(terms), 2 * terms.sqrt(), torch.ones_like(terms), (0.5, 1.0))
    assert kernels.moments([item], YES, "norm").item() == 2**35 + 3 * 2048


# -- steps


@pytest.mark.parametrize("grad", GRADS)
def test_adamw_step(kernels, grad):
    items = adamw_items("none", GRADS[grad], Source(7))
    weights = [item.weight.values.double() for item in items]
    moved = [
        exact_moments(item) if item.grad is not None else tuple(m.double() for m in item[1:3])
        for item in items
    ]
    kernels.adamw(items, YES)
    for item, weight, (exp_avg, exp_avg_sq) in zip(items, weights, moved, strict=True):
        descent = exact_descent(exp_avg, exp_avg_sq)
        exact = weight * STEP.kept - descent
        assert_near(item.weight.values, exact, abs(weight) + abs(descent) + STEP.step_size)
        assert_near(item.exp_avg, exp_avg, abs(exp_avg) + 4)
        assert_near(item.exp_avg_sq, exp_avg_sq, exp_avg_sq)


def test_adamw_is_torchs(kernels):
    source = Source(8)
    start = source.normal(71, 43)
    parameter = torch.nn.Parameter(start.clone())
    torchs = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1, betas=BETAS, eps=1e-6)
    weight, exp_avg, exp_avg_sq = Weight(start.clone()), *2 * (torch.zeros_like(start),)
    exp_avg_sq = exp_avg_sq.clone()
    for t in range(1, 6):
        grad = source.normal(71, 43)
        parameter.grad = grad
        torchs.step()
        step = AdamWStep(1e-2, 0.1, BETAS, 1e-6, t)
        kernels.adamw([AdamW(weight, exp_avg, exp_avg_sq, step, grad, BETAS)], YES)
    torch.testing.assert_close(weight.values, parameter.detach(), rtol=1e-6, atol=1e-7)


def test_each_tensor_has_its_own_scalars(kernels):
    source = Source(9)
    weights = [source.normal(20) for _ in range(3)]
    moments = source.moments(20)
    steps = [AdamWStep(float(i), i / 8, BETAS, float(i), 3 + i) for i in range(3)]
    expected = [
        w.double() * s.kept
        - s.step_size * moments[0].double() / (moments[1].double().sqrt() / s.correction + s.eps)
        for w, s in zip(weights, steps, strict=True)
    ]
    items = [AdamW(Weight(w), *moments, s) for w, s in zip(weights, steps, strict=True)]
    kernels.adamw(items, YES)
    for weight, exact in zip(weights, expected, strict=True):
        assert_near(weight, exact, abs(exact) + 4)


def test_factors_and_their_outputs(kernels):
    items = factor_items(Source(10))
    before = [item.values.double() for item in items]
    moments = [(item.exp_avg.clone(), item.exp_avg_sq.clone()) for item in items]
    kernels.factors(items, YES)
    for item, old, kept in zip(items, before, moments, strict=True):
        descent = exact_descent(*(m.double() for m in kept))
        increment = -descent - STEP.decay * old
        # An increment alone is as exact as its own two terms, not as the factor.
        scale = abs(descent) + abs(STEP.decay * old)
        assert_near(item.values, old + increment, abs(old) + scale)
        for output in item.operands:
            exact = output.old * old + output.increment * increment
            assert_near(output.values, exact, abs(output.old * old) + scale)
        assert torch.equal(item.exp_avg, kept[0])
        assert torch.equal(item.exp_avg_sq, kept[1])


def test_low_rank_write(kernels):
    items = low_rank_items("none", Source(11))
    before = [[t.clone() for t in tensors_of(item)] for item in items]
    kernels.low_rank(items, YES)
    for item, old in zip(items, before, strict=True):
        left, right = item.product.left.double(), item.product.right.double()
        exact, scale = old[0].double(), abs(old[0].double())
        if item.full:
            descent = exact_descent(*(m.double() for m in item.full[:2]))
            exact, scale = exact * STEP.kept - descent, scale + abs(descent)
        assert_near(item.weight.values, exact + left @ right, scale + 4 * abs(left) @ abs(right))
        for now, then in zip(tensors_of(item)[1:], old[1:], strict=True):
            assert torch.equal(now, then)


def test_a_transposed_layer_moves_as_the_plain_one(kernels):
    source = Source(12)
    weight, left, right = source.normal(21, 33), source.normal(21, 6), source.normal(6, 33)
    moments = source.moments(21, 33)
    plain, turned = weight.clone(), weight.t().contiguous()
    kernels.low_rank([LowRank(Weight(plain), Product(left, right, 1.0), (*moments, STEP))], YES)
    moments = (moments[0].t().contiguous(), moments[1].t().contiguous(), STEP)
    kernels.low_rank([LowRank(Weight(turned), Product(right.t(), left.t(), 1.0), moments)], YES)
    torch.testing.assert_close(turned.t(), plain, rtol=1e-6, atol=1e-6)


# -- a step that may not happen


def guarded(kernels: Kernels, grad: float) -> list[Tensor]:
    """Every operation with a gradient that is not finite; return what must not have changed."""
    source = Source(13)
    moments = moments_items(torch.float32, source)
    plain = [
        item
        for rounding in ("none", "nearest", "exact", "stochastic")
        for item in adamw_items(rounding, torch.bfloat16, source)
    ]
    factors, weights = factor_items(source), low_rank_items("exact", source)
    for item in (*moments, *plain):
        item.grad[..., -1] = grad
    kept = [t for item in (*moments, *plain, *factors, *weights) for t in tensors_of(item)]
    before = [t.clone() for t in kept]
    squares = kernels.squares([item.grad for item in (*moments, *plain)])
    assert not squares.isfinite().any()
    finite = squares.isfinite().all()
    assert kernels.moments(moments, finite, "descent").tolist() == [0] * len(moments)
    kernels.adamw(plain, finite)
    kernels.factors(factors, finite)
    kernels.low_rank(weights, finite)
    assert all(same_bits(now, then) for now, then in zip(kept, before, strict=True))
    return kept


@pytest.mark.parametrize("grad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_leaves_every_bit(kernels, grad):
    assert len(guarded(kernels, grad)) > 100


def test_one_bad_gradient_stops_all_tensors(kernels):
    items = moments_items(torch.float32, Source(14))
    items[0].grad[0] = float("nan")
    before = [t.clone() for item in items for t in item[1:3]]
    finite = kernels.squares([item.grad for item in items]).isfinite().all()
    kernels.moments(items, finite, "norm")
    assert all(map(same_bits, (t for item in items for t in item[1:3]), before))


# -- launches and tables


class Counting(Kernels):
    """Counts launches and the tables that were built."""

    launches = 0

    def _launch(self, *args) -> None:
        self.launches += 1
        super()._launch(*args)

    @property
    def tables(self) -> set[int]:
        return {id(table) for _, table in self._tables.values()}


@pytest.mark.parametrize("layers", [2, 12])
def test_launches_do_not_grow_with_layers(layers):
    source, kernels = Source(15), Counting(DEVICE)
    items = [
        AdamW(Weight(source.normal(16)), *source.moments(16), STEP, source.normal(16), BETAS)
        for _ in range(layers)
    ]
    finite = kernels.squares([item.grad for item in items]).isfinite().all()
    kernels.moments([Moments(item.grad, *item[1:3], BETAS) for item in items], finite, "descent")
    kernels.adamw(items, finite)
    assert kernels.launches == 5  # two of them add up


def test_tables_are_kept_until_a_tensor_moves():
    source, kernels = Source(16), Counting(DEVICE)
    weight, grads = source.normal(40), [source.normal(40) for _ in range(2)]
    moments = torch.zeros(40, device=DEVICE), torch.zeros(40, device=DEVICE)
    seen = []
    for grad in (grads[0], grads[0], grads[1]):
        kernels.adamw([AdamW(Weight(weight), *moments, STEP, grad, BETAS)], YES)
        seen.append(kernels.tables)
    assert seen[0] == seen[1] != seen[2]
    twice = BETAS[0] * 0.1 * grads[0].double() * (1 + BETAS[0]) + 0.1 * grads[1].double()
    torch.testing.assert_close(moments[0].double(), twice, rtol=1e-5, atol=1e-6)


def test_same_memory_with_another_shape_is_another_table(kernels):
    values, moments = torch.ones(12, device=DEVICE), Source(17).moments(12)
    for count in (12, 5):
        items = [AdamW(Weight(values[:count]), *(m[:count] for m in moments), STEP)]
        kernels.adamw(items, YES)
    one, two = torch.ones(12, device=DEVICE), torch.ones(12, device=DEVICE)
    kernels.adamw([AdamW(Weight(one), *moments, STEP)], YES)
    two.copy_(one)
    kernels.adamw([AdamW(Weight(two), *moments, STEP)], YES)
    assert torch.equal(values[:5], two[:5])
    assert torch.equal(values[5:], one[5:])


def test_nothing_to_do(kernels):
    empty = [torch.empty(0, device=DEVICE) for _ in range(3)]
    assert kernels.squares([]).shape == (0,)
    assert kernels.moments([], YES, "descent").shape == (0,)
    assert kernels.moments([Moments(*empty, BETAS)], YES, "descent").tolist() == [0]
    kernels.adamw([], YES)
    kernels.factors([], YES)
    kernels.low_rank([], YES)


# -- what is refused


def refused(kernels: Kernels, message: str, item: AdamW) -> None:
    held = [t for t in tensors_of(item) if not t.is_meta]
    before = [t.clone() for t in held]
    with pytest.raises(ValueError, match=message):
        kernels.adamw([item], YES)
    assert all(map(torch.equal, held, before))


def test_wrong_tensors_are_refused(kernels):
    source = Source(18)
    good = AdamW(
        Weight(source.normal(6, 4)), *source.moments(6, 4), STEP, source.normal(6, 4), BETAS
    )
    kernels.adamw([good], YES)
    turned = source.normal(4, 6).t()
    refused(kernels, r"Invalid gradient with strides \(1, 6\)", good._replace(grad=turned))
    scalar = source.normal(1).expand(6, 4)
    refused(kernels, r"Invalid gradient with strides \(0, 0\)", good._replace(grad=scalar))
    refused(kernels, r"Invalid shapes .*Must be one shape", good._replace(grad=source.normal(24)))
    half = source.normal(6, 4, dtype=torch.float16)
    refused(kernels, "Invalid gradient of dtype torch.float16", good._replace(grad=half))
    refused(kernels, "Invalid weight of dtype torch.float16", good._replace(weight=Weight(half)))
    low = Weight(half.bfloat16(), half)
    refused(kernels, "Invalid low of dtype torch.float16", good._replace(weight=low))
    double = good.exp_avg.double()
    refused(kernels, "Invalid exp_avg of dtype torch.float64", good._replace(exp_avg=double))
    gone = torch.empty(6, 4, device="meta")
    refused(kernels, "Invalid exp_avg_sq on meta", good._replace(exp_avg_sq=gone))


def test_wrong_products_are_refused(kernels):
    source = Source(19)
    weight = Weight(source.normal(6, 4))
    for left, right in (((6, 3), (2, 4)), ((6, 2), (2, 5)), ((4, 2), (2, 6))):
        with pytest.raises(ValueError, match=r"Invalid product .* for a weight of shape \(6, 4\)"):
            kernels.low_rank(
                [LowRank(weight, Product(source.normal(*left), source.normal(*right), 1.0))], YES
            )
    gaps = Weight(source.normal(6, 8)[:, :4])
    with pytest.raises(ValueError, match=r"Invalid weight with strides .* Must be contiguous\."):
        kernels.low_rank(
            [LowRank(gaps, Product(source.normal(6, 2), source.normal(2, 4), 1.0))], YES
        )


def test_wrong_flag_is_refused(kernels):
    for flag in (YES.float(), YES.repeat(2), YES.to("meta")):
        for call in (kernels.adamw, kernels.factors, kernels.low_rank):
            with pytest.raises(ValueError, match=r"Invalid finite: .* Must be one torch.bool on"):
                call([], flag)
        with pytest.raises(ValueError, match="Invalid finite"):
            kernels.moments([], flag, "descent")


def test_wrong_term_and_device_are_refused(kernels):
    with pytest.raises(ValueError, match=r"Invalid term='EPD'\. Must be 'descent' or 'norm'"):
        kernels.moments([], YES, "EPD")
    other = torch.device("cuda" if INTERPRETED else "cpu")
    with pytest.raises(ValueError, match=f"Invalid device {other.type}"):
        Kernels(other)
