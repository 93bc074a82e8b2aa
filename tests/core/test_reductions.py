"""Special settings must come to a known optimizer: AdamW on weights, on factors, on both."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from core_helpers import backward, tiny_model, tiny_optimizer
from molf import MoLFAdamW, MoLFConfig

STEPS = 12
LR, LORA_LR, DECAY, LORA_DECAY = 1e-2, 3e-2, 0.2, 0.05


def warmup(step: int) -> float:
    return min(1.0, (step + 1) / 5) * (1 - step / 20)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, False)])
def test_full_expert_always_winning_is_adamw_bit_for_bit(dtype, fused):
    model = tiny_model(dtype)
    dense = copy.deepcopy(model)
    optimizer = tiny_optimizer(model, score="full", lr=LR, lora_lr=LORA_LR, weight_decay=DECAY)
    matrices = [p for p in dense.parameters() if p.dim() >= 2]
    vectors = [p for p in dense.parameters() if p.dim() < 2]
    adamw = AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LR,
        foreach=False,
        fused=fused,
    )
    schedulers = [LambdaLR(optimizer, warmup), LambdaLR(adamw, warmup)]
    before = copy.deepcopy(model.state_dict())
    for step in range(STEPS):
        for each, its_optimizer in ((model, optimizer), (dense, adamw)):
            backward(each, seed=step)
            its_optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert {d.winners for d in optimizer.routing.values()} == {("full",)}
    for (name, got), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(got, expected), name
        assert not torch.equal(got, before[name]), name


class Explicit(nn.Module):
    """A linear layer whose effective weight is spelled out: autograd sees W, A_i and B_i."""

    def __init__(self, layer: nn.Linear, factors: list[tuple[Tensor, Tensor]], scalings) -> None:
        super().__init__()
        self.scalings = scalings
        self.b = nn.Parameter(layer.bias.detach().clone())
        self.A = nn.ParameterList([A.clone() for A, _ in factors])
        self.B = nn.ParameterList([B.clone() for _, B in factors])
        experts = sum(s * B @ A for s, (A, B) in zip(scalings, factors, strict=True))
        self.W = nn.Parameter(layer.weight.detach() - experts)

    def weight(self) -> Tensor:
        experts = zip(self.scalings, self.A, self.B, strict=True)
        return self.W + sum(s * B @ A for s, A, B in experts)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight().t() + self.b


def regression_loss(layer: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 7, generator=generator, dtype=torch.float64)
    target = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return (layer(x).tanh() - target).square().mean()


@pytest.mark.parametrize(
    ("score", "ranks", "top_k"),
    [
        ("lora", (3,), 1),
        ("lora", (2, 4), 2),
        ("epd", (3,), 2),
        ("pfn", (2, 4), 3),
        ("random", (2, 2), 3),
    ],
)
def test_experts_that_always_win_are_adamw_on_explicit_tensors(score, ranks, top_k):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5).double()
    config = MoLFConfig(ranks=ranks, alpha=4.0, score=score, top_k=top_k)
    optimizer = MoLFAdamW.from_model(
        layer,
        config,
        lr=LR,
        lora_lr=LORA_LR,
        weight_decay=DECAY,
        lora_weight_decay=LORA_DECAY,
        betas=(0.85, 0.97),
        eps=1e-6,
    )
    factors = [(A, 0.2 * torch.randn_like(B)) for A, B in optimizer.lora_factors("")]
    optimizer.set_lora_factors("", factors)
    explicit = Explicit(layer, factors, config.scalings)
    full_wins = score != "lora"
    groups = [{"params": [*explicit.A, *explicit.B], "lr": LORA_LR, "weight_decay": LORA_DECAY}]
    if full_wins:
        groups.append({"params": [explicit.W], "weight_decay": DECAY})
        groups.append({"params": [explicit.b], "weight_decay": 0.0})
    adamw = AdamW(groups, lr=LR, betas=(0.85, 0.97), eps=1e-6)
    schedulers = [LambdaLR(optimizer, warmup), LambdaLR(adamw, warmup)]
    start = layer.weight.detach().clone()
    for step in range(STEPS):
        for each, its_optimizer in ((layer, optimizer), (explicit, adamw)):
            its_optimizer.zero_grad()
            regression_loss(each, step).backward()
            its_optimizer.step()
        for scheduler in schedulers:
            scheduler.step()

    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(layer.weight.detach(), explicit.weight().detach(), **close)
    torch.testing.assert_close(layer.bias.detach(), explicit.b.detach(), **close)
    for (A, B), its_A, its_B in zip(
        optimizer.lora_factors(""), explicit.A, explicit.B, strict=True
    ):
        torch.testing.assert_close(A, its_A.detach(), **close)
        torch.testing.assert_close(B, its_B.detach(), **close)
    assert (layer.weight - start).abs().max() > 10 * LR


def test_one_step_by_hand():
    """`G = [[1, 0], [0, -2]]`, one LoRA expert of rank 1; every number worked out on paper."""
    layer = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    config = MoLFConfig(ranks=(1,), alpha=2.0)  # s = 2
    make = {"lr": 0.1, "weight_decay": 0.5, "lora_weight_decay": 0.1, "betas": (0.5, 0.75)}
    optimizer = MoLFAdamW.from_model(layer, config, lora_lr=0.2, eps=1e-12, **make)
    A, B = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[0.5], [1.0]]).double()
    optimizer.set_lora_factors("", [(A, B)])
    # W = W_eff - 2 B A = [[1, 2], [3, 4]] - [[1, 0.5], [2, 1]] = [[0, 1.5], [1, 3]]
    layer.weight.grad = torch.tensor([[1.0, 0.0], [0.0, -2.0]]).double()

    optimizer.step()
    # m = g/2, v = g^2/4, so sqrt(v) = |g|/2 and m^2/sqrt(v) = |g|/2 (the score's eps is 1e-8).
    # full: 0.1/4 * (0.5 + 1) = 0.0375
    # grad A = 2 B^T G = [1, -4];  grad B = 2 G A^T = [2, -2]
    # lora: 0.2/4 * (0.5 + 2 + 1 + 1) = 0.225
    decision = optimizer.routing[""]
    assert decision.winners == ("lora0_r1",)
    assert decision.scores == pytest.approx({"full": 0.0375, "lora0_r1": 0.225}, rel=1e-6)
    # m^ / sqrt(v^) = sign(g), and decay keeps 1 - 0.2 * 0.1 = 0.98 of A and B.
    expected_A = torch.tensor([[0.98 * 1.0 - 0.2, 0.98 * 0.5 + 0.2]])  # [0.78, 0.69]
    expected_B = torch.tensor([[0.98 * 0.5 - 0.2], [0.98 * 1.0 + 0.2]])  # [0.29, 1.18]
    ((got_A, got_B),) = optimizer.lora_factors("")
    torch.testing.assert_close(got_A, expected_A.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(got_B, expected_B.double(), rtol=0, atol=1e-7)
    # W_eff = W + 2 B' A' = [[0, 1.5], [1, 3]] + [[0.4524, 0.4002], [1.8408, 1.6284]]
    expected = torch.tensor([[0.4524, 1.9002], [2.8408, 4.6284]]).double()
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("score", ["epd", "pfn", "random", "full", "lora"])
def test_loss_falls_tenfold_on_a_regression(score):
    torch.manual_seed(0)
    teacher = torch.randn(8, 12)
    x = torch.randn(256, 12)
    target = x @ teacher.t()
    layer = nn.Linear(12, 8)
    config = MoLFConfig(ranks=(8,), alpha=8.0, score=score)
    optimizer = MoLFAdamW.from_model(layer, config, lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] / 10
