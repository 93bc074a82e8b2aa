"""Halves of a step by torch's fused kernel, against single operations and the whole step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from core_helpers import Conv1D, as_on_an_accelerator, feed, snapshot, tiny_optimizer
from molf.core.arithmetic import adam, one_pass
from molf.core.arithmetic.adam import (
    AdamWStep,
    MomentDecay,
    update_and_score,
    update_moments,
)
from molf.core.scores.terms import DESCENT, FRESH, NOISE, NORM

YES = torch.tensor(True)
TERMS = {"epd": DESCENT, "pfn": NORM, "noise": NOISE, "fresh": FRESH}
SHAPES = [(), (1,), (15,), (16,), (17,), (5, 7), (64, 48), (3, 4, 5)]


def moments(shape, dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    grad, exp_avg = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    return grad, exp_avg, torch.rand(shape, dtype=dtype)


def decay(betas=(0.9, 0.999), dtype=torch.float32, *, known: bool) -> MomentDecay:
    return MomentDecay.of(betas, YES, dtype, is_known_finite=known)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0), (0.5, 1 - 1e-9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pass_is_single_operations(shape, dtype, betas):
    ends = []
    for known in (True, False):
        grad, exp_avg, exp_avg_sq = moments(shape, dtype)
        how = decay(betas, dtype, known=known)
        sums = [
            update_and_score(grad, exp_avg, exp_avg_sq, how, [TERMS[score]])[0].double()
            for score in TERMS
        ]
        ends.append((exp_avg, exp_avg_sq, *sums))
    limit = 4 * torch.finfo(dtype).eps
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=limit * 8, atol=limit)


@pytest.mark.parametrize("score", ["epd", "pfn"])
@pytest.mark.parametrize("known", [True, False])
def test_eps_is_added_to_the_root(known, score):
    """Where the roots of the second moments are as small as eps, it matters where it stands."""
    _, exp_avg, _ = moments((32, 48), torch.float64)
    exp_avg, exp_avg_sq = exp_avg * 1e-8, (exp_avg * 3e-8).square()
    how = decay(dtype=torch.float64, known=known)
    (got,) = update_and_score(torch.zeros_like(exp_avg), exp_avg, exp_avg_sq, how, [TERMS[score]])
    root = exp_avg_sq.sqrt() + 1e-8
    expected = (exp_avg**2 / root if score == "epd" else (exp_avg / root) ** 2).sum()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_direction_has_no_bias_correction_left():
    grad, exp_avg, exp_avg_sq = moments((64, 48), torch.float32)
    scratch = one_pass.Scratch()
    direction = one_pass.move(grad, exp_avg, exp_avg_sq, (0.9, 0.999), 1e-8, scratch)
    torch.testing.assert_close(
        direction, exp_avg / (exp_avg_sq.sqrt() + 1e-8), rtol=1e-6, atol=1e-6
    )


def test_nothing_of_the_last_direction_is_left():
    scratch = one_pass.Scratch()
    for size in (100, 40, 33, 1000, 1):
        for scale in (1.0, -1e30):
            block = [x * scale for x in moments((size,), torch.float32)]
            block[2].abs_()
            alone = one_pass.move(*[x.clone() for x in block], (0.9, 0.9), 1e-8, one_pass.Scratch())
            assert torch.equal(one_pass.move(*block, (0.9, 0.9), 1e-8, scratch), alone)


def test_a_moment_of_nan_spoils_no_later_step():
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    optimizer = tiny_optimizer(model)
    feed(model, 0)
    optimizer.step()
    moment = optimizer.state[model[0].weight]["exp_avg"]
    kept = moment.clone()
    moment.fill_(float("nan"))
    feed(model, 1)
    with pytest.raises(RuntimeError, match="Scores of layer 0 are not finite"):
        optimizer.step()
    moment.copy_(kept)
    optimizer.step()


STEPS = [  # betas, eps
    ((0.9, 0.999), 1e-8),
    ((0.9, 0.95), 1e-6),
    ((0.0, 0.5), 0.0),
    ((0.5, 1 - 1e-9), 1e-30),
    ((0.99, 0.0), 1.0),
]


@pytest.mark.parametrize(("betas", "eps"), STEPS)
@pytest.mark.parametrize("step", [1, 2, 7, 1000, 10**6])
@pytest.mark.parametrize("shape", [*SHAPES, (300, 700)], ids=str)
def test_halves_are_torchs_fused_step_bit_for_bit(shape, step, betas, eps):
    """Whatever the moments' size: values of a thousandth to a thousand, and their squares."""
    grad, exp_avg, exp_avg_sq = moments(shape, torch.float32)
    size = 10 ** (6 * torch.rand(shape) - 3)
    grad, exp_avg, exp_avg_sq = grad * size, exp_avg * size, exp_avg_sq * size.square()
    rest = {"betas": betas, "eps": eps, "step": step}
    whole = [torch.randn(shape), grad.clone(), exp_avg.clone(), exp_avg_sq.clone()]
    values = whole[0].clone()
    one_pass.adamw(*whole, lr=0.3, weight_decay=0.1, **rest)

    one_pass.move(grad, exp_avg, exp_avg_sq, betas, 1e-8, one_pass.Scratch())
    moved = exp_avg.clone(), exp_avg_sq.clone()
    values.mul_(1 - 0.3 * 0.1)
    AdamWStep(0.3, 0.1, **rest).descend_(values, exp_avg, exp_avg_sq)
    assert torch.equal(values, whole[0])
    for moment, before, expected in zip((exp_avg, exp_avg_sq), moved, whole[2:], strict=True):
        assert torch.equal(moment, before), "the descent leaves moments alone"
        assert torch.equal(moment, expected)


def test_descent_leaves_the_smallest_and_largest_moments_alone():
    exp_avg = torch.tensor([2.0**e for e in range(-149, 128)] + [0.0])
    exp_avg = torch.cat([exp_avg, -exp_avg])
    exp_avg_sq = torch.cat([exp_avg[: len(exp_avg) // 2]] * 2)
    for tensors in ((exp_avg, exp_avg_sq), (exp_avg.flip(0), exp_avg_sq)):
        before = [x.clone() for x in tensors]
        values = torch.zeros_like(exp_avg)
        one_pass.descend(values, *tensors, step_size=1.0, correction=0.7, eps=1e-8)
        for one, other in zip(tensors, before, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1.0, 0.25, -3.0])
def test_descent_is_the_formula(scale):
    _, exp_avg, exp_avg_sq = moments((33, 47), torch.float32)
    step = AdamWStep(0.3, 0.1, (0.9, 0.99), 1e-3, 5)
    values, wide = torch.zeros(33, 47), torch.zeros(33, 47, dtype=torch.float64)
    step.descend_(values, exp_avg, exp_avg_sq, scale=scale)
    step.descend_(wide, exp_avg.double(), exp_avg_sq.double(), scale=scale)
    torch.testing.assert_close(values.double(), wide, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("score", ["epd", "pfn"])
def test_sums_by_column(score):
    grad, exp_avg, exp_avg_sq = moments((32, 10), torch.float32)
    (got,) = update_and_score(
        grad, exp_avg, exp_avg_sq, decay(known=True), [TERMS[score]], by_column=True
    )
    root = exp_avg_sq.double().sqrt() + 1e-8
    exact = exp_avg.double() ** 2 / (root if score == "epd" else root**2)
    torch.testing.assert_close(got.double(), exact.sum(0), rtol=1e-5, atol=0)


def test_tensors_that_are_not_contiguous_go_another_way():
    """The kernel walks along memory, so it would mix the elements of a transposed moment up."""
    grad, exp_avg, exp_avg_sq = moments((6, 9), torch.float32)
    turned = [x.t().contiguous().t() for x in (exp_avg, exp_avg_sq)]
    update_moments(grad, exp_avg, exp_avg_sq, decay(known=True))
    update_moments(grad, *turned, decay(known=True))
    torch.testing.assert_close(turned, [exp_avg, exp_avg_sq], rtol=1e-6, atol=1e-7)
    update_moments(grad.t().contiguous().t(), exp_avg, exp_avg_sq, decay(known=True))
    update_moments(grad, *turned, decay(known=True))
    torch.testing.assert_close(turned, [exp_avg, exp_avg_sq], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("score", ["epd", "pfn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cpu_takes_the_steps_of_an_accelerator(dtype, score):
    ends, routes = [], []
    for known in (True, False):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(19, 33), Conv1D(21, 13), nn.LayerNorm(5)]).to(dtype)
        optimizer = tiny_optimizer(model, score=score, top_k=2, lr=1e-3)
        optimizer = optimizer if known else as_on_an_accelerator(optimizer)
        routes.append([])
        for step in range(6):
            feed(model, step)
            optimizer.step()
            routes[-1].append({name: d.winners for name, d in optimizer.routing.items()})
        ends.append(snapshot(model, optimizer))
    assert routes[0] == routes[1]
    relative = 1e-12 if dtype == torch.float64 else 2e-5
    for one, other in zip(*(snapshot_values(end) for end in ends), strict=True):
        limit = relative * other.abs().max().item()
        if one.dtype == torch.bfloat16:
            limit = 2**-8 * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=limit)


def snapshot_values(found) -> list[torch.Tensor]:
    """The floating-point tensors of a snapshot."""
    return [
        value.detach()
        for value in torch.utils._pytree.tree_leaves(found)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]


@pytest.mark.parametrize("shape", [(40, 7), (40, 16), (40, 24), (40, 1), (40,)], ids=str)
def test_size_of_blocks_changes_no_bit(shape):
    """Blocks start where the kernel's vectors do, whatever the length of a row."""
    found = []
    for rows in (40, one_pass.rows_of_whole_vectors(torch.empty(shape))):
        grad, exp_avg, exp_avg_sq = moments(shape, torch.float32)
        for start in range(0, 40, rows):
            part = slice(start, start + rows)
            block = (grad[part], exp_avg[part], exp_avg_sq[part])
            adam.update_moments(*block, decay(known=True))
        found.append((exp_avg, exp_avg_sq))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


DEFAULT_DEVICE = """
import sys, torch
when = sys.argv[1]
if when == "import":
    torch.set_default_device("meta")
from molf.core.arithmetic import one_pass
block = [torch.ones(20, device="cpu") for _ in range(3)]
values = torch.zeros(20, device="cpu")
torch.set_default_device("meta" if when == "use" else "cpu")
direction = one_pass.move(*block, (0.5, 0.5), 0.0, one_pass.Scratch())
assert direction.device.type == "cpu" and (direction == 1).all()
one_pass.descend(values, *block[1:], step_size=0.5, correction=1.0, eps=0.0)
assert (values == -0.5).all()
betas = (0.5, 0.5)
one_pass.adamw(values, *block, lr=0.5, weight_decay=0.0, betas=betas, eps=0.0, step=100)
assert (values == -1).all()
"""


@pytest.mark.parametrize("when", ["import", "use"])
def test_whatever_the_default_device(when):
    """A model is often built under another one, and the package imported when it is first used."""
    done = subprocess.run(
        [sys.executable, "-c", DEFAULT_DEVICE, when], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
