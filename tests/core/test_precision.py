"""How exactly the step's products are computed, whatever the training loop has set."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from core_helpers import assert_same_bits, feed, run, snapshot, tiny_model, tiny_optimizer
from molf import MoLFAdamW, MoLFConfig
from molf.core.arithmetic.precision import full_precision


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def test_increment_of_the_weight_has_float32_accuracy_at_rank_128():
    """The difference `B'A' - BA` would not: it cancels."""
    rank, size = 128, 192
    torch.manual_seed(0)
    B = 0.1 * torch.randn(size, rank)
    grads = [torch.randn(size, size) for _ in range(3)]
    config = MoLFConfig(ranks=(rank,), score="lora")
    increments, factors = {}, {}
    for dtype in (torch.float32, torch.float64):
        layer = nn.Linear(size, size, bias=False).to(dtype)
        optimizer = MoLFAdamW.from_model(layer, config, lr=1e-4)
        ((A, _),) = optimizer.lora_factors("")
        optimizer.set_lora_factors("", [(A, B)])
        nn.init.zeros_(layer.weight)  # so that the weight's own rounding does not hide anything
        for grad in grads:
            layer.weight.grad = grad.to(dtype)
            nn.init.zeros_(layer.weight)
            before = optimizer.lora_factors("")[0]
            optimizer.step()
        increments[dtype] = layer.weight.detach().clone()
        factors[dtype] = before, optimizer.lora_factors("")[0]
    exact = increments[torch.float64]
    assert relative(increments[torch.float32], exact) < 1e-6
    (A, B), (new_A, new_B) = factors[torch.float32]
    naive = config.scalings[0] * (new_B @ new_A - B @ A)
    assert relative(naive, exact) > 1e-5


class ProductSettings(TorchDispatchMode):
    """Records, for every product, the precision in force and the dtype of its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "matmul"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.seen |= {(torch.get_float32_matmul_precision(), x.dtype) for x in tensors}
        return func(*args, **(kwargs or {}))


BACKENDS = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def legacy(value: str):
    return lambda: torch.set_float32_matmul_precision(value)


def by_backend(backend: object, value: str):
    return lambda: setattr(backend, "fp32_precision", value)


@pytest.fixture
def reset_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"


@pytest.mark.parametrize(
    "lower",
    [
        lambda: None,
        legacy("medium"),
        legacy("high"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        by_backend(torch.backends, "tf32"),  # TrainingArguments(tf32=True)
        by_backend(torch.backends, "ieee"),
        by_backend(torch.backends.cuda.matmul, "tf32"),
        by_backend(torch.backends.mkldnn.matmul, "bf16"),
    ],
    ids=["default", "medium", "high", "accelerate", "trainer", "trainer-off", "cuda", "mkldnn"],
)
@pytest.mark.usefixtures("reset_precision")
def test_products_are_exact_whatever_precision_is_set(lower):
    model = tiny_model()
    optimizer = tiny_optimizer(model, top_k=3)
    feed(model, 0)
    lower()
    before = [backend.fp32_precision for backend in BACKENDS]
    settings = ProductSettings()
    with settings:
        optimizer.step()
    assert settings.seen == {("highest", torch.float32)}
    assert [backend.fp32_precision for backend in BACKENDS] == before

    model.up.weight.grad[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="Non-finite"):
        optimizer.step()
    assert [backend.fp32_precision for backend in BACKENDS] == before


@pytest.mark.usefixtures("reset_precision")
def test_inherited_precision_still_follows_its_parent_after_a_step():
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    torch.backends.fp32_precision = "tf32"
    run(model, optimizer, [0])
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_autocast_is_off_for_every_device_type():
    with full_precision(["cpu"]):
        assert not torch.is_autocast_enabled("cpu")
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # `torch.autocast` wants a GPU for that
    try:
        with torch.autocast("cpu"), full_precision(["cpu", "cuda"]):
            assert not torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enclosing_autocast_changes_no_bit(dtype):
    model = tiny_model(dtype)
    twin = copy.deepcopy(model)
    optimizer, inside = tiny_optimizer(model, top_k=3), tiny_optimizer(twin, top_k=3)
    for step in range(3):
        for each in (model, twin):
            feed(each, step)
        optimizer.step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside.step()
    assert_same_bits(snapshot(twin, inside), snapshot(model, optimizer))
