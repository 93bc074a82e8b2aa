"""An expert that has not won yet: its B is zero, and products with it are left out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from core_helpers import feed, snapshot, tiny_model, tiny_optimizer
from molf.core.execute.eager import Eager
from molf.core.model import factors
from molf.core.model.factors import live_ranks

RANKS = (2, 3, 1)


@pytest.mark.parametrize(
    ("live", "expected"),
    [
        ((), []),
        ((0,), [slice(0, 2)]),
        ((1, 2), [slice(2, 6)]),
        ((0, 2), [slice(0, 2), slice(5, 6)]),
        ((0, 1, 2), [slice(0, 6)]),
    ],
)
@pytest.mark.parametrize("value", [1.0, -1e-45, float("nan"), float("-inf")])
@pytest.mark.parametrize("row", [0, 3])
def test_live_ranks_are_those_whose_columns_hold_anything_but_zeros(live, expected, value, row):
    lora_B = torch.zeros(4, sum(RANKS)).neg()  # a negative zero is a zero
    for index in live:
        lora_B[row, factors.owned_by(RANKS, index).stop - 1] = value
    assert live_ranks(RANKS, lora_B, can_read=True) == expected


def test_all_ranks_count_as_live_where_the_host_would_wait():
    assert live_ranks(RANKS, torch.zeros(4, sum(RANKS)), can_read=False) == [slice(0, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{"score": "random"}, {"top_k": 2}, {"lora_lr": 0.03}])
def test_products_with_zeros_can_be_left_out(settings, dtype):
    runs = []
    for looks in (True, False):
        model = tiny_model(dtype)
        optimizer = tiny_optimizer(model, ranks=RANKS, weight_decay=0.5, **settings)
        reads_columns_of = (lambda device: True) if looks else (lambda device: False)
        optimizer.executor = Eager(can_read=reads_columns_of)
        winners = []
        for step in range(12):
            feed(model, step)
            optimizer.step()
            winners.append({name: x.winners for name, x in optimizer.routing.items()})
        runs.append((winners, snapshot(model, optimizer)))
    (winners, left_out), (expected_winners, complete) = runs
    assert winners == expected_winners
    assert len({x for step in winners for names in step.values() for x in names}) > 1
    assert left_out.keys() == complete.keys()
    for key in [key for key in complete if not key.endswith("/low")]:
        is_rounded = getattr(complete[key], "dtype", None) == torch.bfloat16
        tolerance = {"rtol": 2**-7, "atol": 0.0} if is_rounded else {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(left_out[key], complete[key], **tolerance)


def test_moments_of_a_still_fade_when_b_is_set_to_zero():
    layer = nn.Linear(6, 4, bias=False)
    optimizer = tiny_optimizer(layer, ranks=(2,), score="lora")
    for step in range(3):
        feed(layer, step)
        optimizer.step()
    ((A, B),) = optimizer.lora_factors("")
    optimizer.set_lora_factors("", [(A, torch.zeros_like(B))])
    state = optimizer.state[layer.weight]
    first, second = state["lora_A_exp_avg"].clone(), state["lora_A_exp_avg_sq"].clone()
    assert first.any()
    feed(layer, 3)
    optimizer.step()
    torch.testing.assert_close(state["lora_A_exp_avg"], 0.9 * first)
    torch.testing.assert_close(state["lora_A_exp_avg_sq"], 0.999 * second)


class Products(TorchDispatchMode):
    """Adds up the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.operations += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("moved", "ranks"),  # of products with a matrix of the weight's size
    [
        ((), 6),  # G A'
        ((1,), 6 + 2 * 3),  # and B' G, B A of one expert
        ((0, 1, 2), 6 + 2 * 6),
    ],
)
def test_products_of_a_step(moved, ranks):
    layer = nn.Linear(24, 16, bias=False)
    optimizer = tiny_optimizer(layer, ranks=RANKS, score="full")
    pairs = optimizer.lora_factors("")
    optimizer.set_lora_factors(
        "", [(A, B + 1 if index in moved else B) for index, (A, B) in enumerate(pairs)]
    )
    feed(layer, 0)
    with Products() as products:
        optimizer.step()
    assert products.operations == 2 * 24 * 16 * ranks
