"""What a step may cost: state that is kept, and how often the host waits for the device."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core_helpers import as_on_an_accelerator, feed, run, tiny_model, tiny_optimizer
from executors import ReadsOfTheHost
from molf.core.scores.registry import SCORES
from molf.core.step.folded import FoldedLayer


def test_state_is_made_in_the_first_step():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    assert not optimizer.state
    optimizer.lora_factors("up")
    assert not any(optimizer.state.values())
    run(model, optimizer, [0])
    assert len(optimizer.state) == 7


def test_reading_factors_makes_nothing_of_a_weights_size():
    layer = nn.Linear(53, 37, bias=False)
    optimizer = tiny_optimizer(layer)
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend([result.shape] if isinstance(result, Tensor) else [])
            return result

    with Made():
        optimizer.lora_factors("")
    assert made
    assert (37, 53) not in made


def test_only_moments_have_the_size_of_a_weight():
    layer = nn.Linear(53, 37)
    optimizer = tiny_optimizer(layer)
    for step in range(2):
        feed(layer, step)
        optimizer.step()
    assert {
        key
        for key, value in optimizer.state[layer.weight].items()
        if isinstance(value, Tensor) and value.numel() >= layer.weight.numel()
    } == {"exp_avg", "exp_avg_sq"}
    gc.collect()
    with warnings.catch_warnings():  # of attributes that other libraries have deprecated
        warnings.simplefilter("ignore")
        found = [x for x in gc.get_objects() if isinstance(x, Tensor)]
        # Lazy parameters of other tests have no shape.
        found = [x for x in found if not isinstance(x, nn.UninitializedParameter)]
        alive = [x for x in found if x.shape == (37, 53)]
    storages = {x.untyped_storage().data_ptr() for x in alive}
    assert len(storages) == 4  # weight, gradient, exp_avg, exp_avg_sq


@pytest.mark.parametrize("layers", [2, 20])
@pytest.mark.parametrize("score", [*SCORES, "random:0.3", "share:0.5:gsnr", "shuffled:fresh"])
@pytest.mark.parametrize("requires", [False, True])
def test_the_host_waits_once_per_step(layers, score, requires, monkeypatch):
    model = nn.ModuleList([nn.Linear(4, 5) for _ in range(layers)] + [nn.LayerNorm(3)])
    top_k = 1 if score == "full" else 2
    optimizer = as_on_an_accelerator(
        tiny_optimizer(model, score=score, ranks=(2, 3, 4), top_k=top_k)
    )
    reads = ReadsOfTheHost(monkeypatch)
    for step in range(2):
        feed(model, step)
        reads.count = 0
        with reads:
            if requires:
                optimizer.require_finite(torch.tensor(1.0), torch.tensor(2.0))
            optimizer.step()
        assert reads.count == 1
    with reads:
        bool(model[0].bias.sum() > 0)  # the counter counts
    assert reads.count == 2


def test_operands_of_one_layer_exist_at_a_time(monkeypatch):
    """They are as large as a layer's factors, and a step may have hundreds of layers."""
    alive: list[weakref.ref] = []
    counts = []
    writes = FoldedLayer.writes

    def recorded(layer, winners):
        counts.append(sum(ref() is not None for ref in alive))
        found = writes(layer, winners)
        alive.extend(weakref.ref(write.product.left) for write in found.tensors if write.product)
        return found

    monkeypatch.setattr(FoldedLayer, "writes", recorded)
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)])
    optimizer = tiny_optimizer(model, score="lora")
    feed(model, 0)
    optimizer.step()
    assert len(alive) == 5
    assert counts == [0] * 5
