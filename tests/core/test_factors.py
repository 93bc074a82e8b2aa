"""The LoRA factors: how they start, how they are read and replaced."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from core_helpers import Conv1D, backward, run, tiny_model, tiny_optimizer
from molf import MoLFAdamW, MoLFConfig
from molf.core.arithmetic.blocks import BLOCKS
from molf.core.step.folded import FoldedLayer


def initial_factors(model: nn.Module, layer: str, **config) -> list[tuple[Tensor, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MoLFAdamW.from_model(model, MoLFConfig(**config)).lora_factors(layer)


def test_a_starts_uniform_and_b_at_zero():
    ((A, B),) = initial_factors(nn.Linear(400, 30), "", ranks=(250,))
    bound = 1 / math.sqrt(400)
    assert A.shape == (250, 400)
    assert not B.any()
    assert B.shape == (30, 250)
    assert -bound <= A.min() < -0.999 * bound
    assert 0.999 * bound < A.max() <= bound
    assert abs(A.mean()) < 5 * bound / math.sqrt(3 * A.numel())
    assert A.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    assert A.double().pow(4).mean().item() == pytest.approx(bound**4 / 5, rel=0.03)


def test_a_depends_on_seed_layer_and_expert_alone():
    first = initial_factors(tiny_model(), "up", ranks=(2, 3))
    again = initial_factors(tiny_model(seed=7).double(), "up", ranks=(5, 3), alpha=1.0)
    assert torch.equal(again[1][0], first[1][0].double())  # whatever the other ranks and dtype
    assert torch.equal(again[0][0][:2], first[0][0].double())
    wrapped = initial_factors(torch.compile(tiny_model()), "up", ranks=(2, 3))
    assert torch.equal(wrapped[0][0], first[0][0])
    torch.manual_seed(123)
    alone = nn.ModuleDict({"up": nn.Linear(6, 4)})
    assert torch.equal(initial_factors(alone, "up", ranks=(2, 3))[0][0], first[0][0])

    model = nn.ModuleDict({"up": nn.Linear(6, 6), "gate": nn.Linear(6, 6)})
    up, other = initial_factors(model, "up", ranks=(2, 2))
    gate, _ = initial_factors(model, "gate", ranks=(2, 2))
    reseeded, _ = initial_factors(model, "up", ranks=(2, 2), seed=1)
    drawn = [A for A, _ in (up, other, gate, reseeded)]
    for i, A in enumerate(drawn):
        assert all((A != B).all() for B in drawn[:i])


def test_a_is_what_it_has_always_been():
    """Golden numbers: a run's start must not change between versions."""
    ((A, _),) = initial_factors(nn.ModuleDict({"up": nn.Linear(3, 2)}), "up", ranks=(1,))
    torch.testing.assert_close(A, torch.tensor([GOLDEN_A]), rtol=0, atol=1e-7)


GOLDEN_A = [-0.066870272, -0.360145807, 0.263921022]


def test_drawing_leaves_the_global_generator_alone():
    model = tiny_model()
    before = torch.get_rng_state()
    optimizer = tiny_optimizer(model)
    backward(model, 0)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_factors_read_are_copies():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for _ in range(2):  # before the first step, and after it
        before = optimizer.lora_factors("up")
        for A, B in optimizer.lora_factors("up"):
            A.fill_(7.0)
            B.fill_(7.0)
        for (A, B), (old_A, old_B) in zip(optimizer.lora_factors("up"), before, strict=True):
            assert torch.equal(A, old_A)
            assert torch.equal(B, old_B)
        run(model, optimizer, [0])


def test_replaced_factors_keep_the_effective_weight_and_the_moments():
    model = tiny_model()
    optimizer = tiny_optimizer(model, score="lora")
    run(model, optimizer, range(2))
    weight = model.up.weight.detach().clone()
    moment = optimizer.state[model.up.weight]["lora_A_exp_avg"].clone()
    factors = [(A + 1, B - 1) for A, B in optimizer.lora_factors("up")]
    optimizer.set_lora_factors("up", factors)
    assert torch.equal(model.up.weight, weight)
    assert torch.equal(optimizer.state[model.up.weight]["lora_A_exp_avg"], moment)
    for (A, B), (new_A, new_B) in zip(optimizer.lora_factors("up"), factors, strict=True):
        assert torch.equal(A, new_A)
        assert torch.equal(B, new_B)


def test_wrong_layer_or_shape_is_refused():
    optimizer = tiny_optimizer(tiny_model())
    with pytest.raises(ValueError, match=r"No routed layer 'lm_head'\. Routed are: up, down"):
        optimizer.lora_factors("lm_head")
    factors = optimizer.lora_factors("up")
    with pytest.raises(ValueError, match="Invalid factors for up: shapes"):
        optimizer.set_lora_factors("up", factors[::-1])
    with pytest.raises(ValueError, match="Invalid factors for up: shapes"):
        optimizer.set_lora_factors("up", factors[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shard_without_rows_adds_nothing_to_the_far_gradient(dtype, monkeypatch):
    model = nn.ModuleList([Conv1D(6, 8)]).to(dtype)
    optimizer = tiny_optimizer(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    layer = FoldedLayer(optimizer.param_groups[0], optimizer.state)
    layer.weight = nn.Parameter(torch.empty(0, 6, dtype=dtype))
    layer.weight.grad = torch.empty_like(layer.weight)
    layer.state["lora_A"] = layer.state["lora_A"][:, :0]
    # Memory that nothing has written has any values.
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    grad_A, grad_B = layer.factor_gradients(BLOCKS, far=torch.randn(6, 5))
    assert grad_A.shape == (5, 0)
    assert torch.equal(grad_B, torch.zeros(6, 5))
