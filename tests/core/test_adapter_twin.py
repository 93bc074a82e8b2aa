"""The adapter form against the slow twin, over random layers, scalings and gradients."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import molf
from core_helpers import Pair, Rates, Twin
from molf.core.config import MoLFConfig
from molf.core.optimizer import MoLFAdamW
from reference_scores import FURTHER

STEPS = 6
SIZES = st.sampled_from((1, 2, 3, 5, 8))
DECAYS = st.sampled_from((0.0, 0.01, 0.3))


@dataclass
class AdapterPair:
    """The fast optimizer over PEFT layers, beside one twin per layer that keeps W, A_i, B_i apart.

    `s` is the scaling of the one adapter; its gradients are drawn independently of the base's, as
    dropout would make them.
    """

    config: MoLFConfig
    rates: Rates
    layers: dict[str, nn.Module]
    alpha: int  # of PEFT's own setting
    seed: int
    dtype: torch.dtype
    weight_rounding: str | None = None
    twins: dict[str, Twin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = molf.peft_config(self.config, target_modules=list(self.layers))
        settings.lora_alpha = self.alpha
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(nn.ModuleDict(self.layers), settings)
            self.model = molf.with_adapter(model.to(self.dtype), self.config)
            self.optimizer = MoLFAdamW.from_model(
                self.model,
                self.config,
                lr=self.rates.lr,
                lora_lr=self.rates.lora_lrs,
                weight_decay=self.rates.weight_decay,
                lora_weight_decay=self.rates.lora_weight_decays,
                betas=self.rates.betas,
                eps=self.rates.eps,
                weight_rounding=self.weight_rounding,
            )
        self.s = self.alpha / sum(self.config.ranks)
        self.tuners = {name: self.model.base_model.model[name] for name in self.layers}
        self.generator = torch.Generator().manual_seed(self.seed)
        for name, tuner in self.tuners.items():
            with torch.no_grad():
                for factor in self.factors(tuner):
                    factor.copy_(self.random(factor, 0.3))
            base, config = tuner.base_layer, self.config
            bias = None if base.bias is None else base.bias.detach().double()
            self.twins[name] = Twin(
                self.weight(base).double(), self.parts(tuner), config, self.rates, bias
            )

    def random(self, like: Tensor, scale: float) -> Tensor:
        """Random numbers, exact in the dtype, as float64."""
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return (scale * drawn).to(self.dtype).double()

    @staticmethod
    def factors(tuner) -> tuple[nn.Parameter, nn.Parameter]:
        return tuner.lora_A["default"].weight, tuner.lora_B["default"].weight

    @staticmethod
    def weight(base: nn.Module) -> Tensor:
        weight = base.weight.detach()
        return weight.t() if isinstance(base, Conv1D) else weight

    def slices(self, stacked_A: Tensor, stacked_B: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows of A and columns of B by expert, counted out one by one."""
        found, row = [], 0
        for rank in self.config.ranks:
            rows = [stacked_A[row + i] for i in range(rank)]
            columns = [stacked_B[:, row + i] for i in range(rank)]
            found.append((torch.stack(rows, 0), torch.stack(columns, 1)))
            row += rank
        return found

    def parts(self, tuner) -> list[tuple[Tensor, Tensor]]:
        """(A_i, B_i) as the paper scales them: s (stored columns) = s_i B_i."""
        A, B = (factor.detach().double() for factor in self.factors(tuner))
        pairs = zip(self.slices(A, B), self.config.scalings, strict=True)
        return [(A_i, self.s * stored / s_i) for (A_i, stored), s_i in pairs]

    def step(self, factor: float, scale: float, near: float, relative: float) -> None:
        """Take one step on both sides; compare winners, scores, weights and moments."""
        given = {}
        for name, tuner in self.tuners.items():
            base = tuner.base_layer
            A, B = self.factors(tuner)
            grad_A, grad_B = self.random(A, scale), self.random(B, scale)
            A.grad, B.grad = grad_A.to(self.dtype), grad_B.to(self.dtype)
            # y = s sum_j b_j a_j x over stored columns b_j, and s b_j = s_i B_ij: so the gradient
            # of B_ij is s_i / s times that of b_j.
            pairs = zip(self.slices(grad_A, grad_B), self.config.scalings, strict=True)
            parts = [(a, b * s_i / self.s) for (a, b), s_i in pairs]
            G = self.random(self.weight(base), scale)
            grad_bias = None if base.bias is None else self.random(base.bias, scale)
            if not self.config.freeze_base:
                grad = G.t() if isinstance(base, Conv1D) else G
                base.weight.grad = grad.to(self.dtype).contiguous()
                if base.bias is not None:
                    base.bias.grad = grad_bias.to(self.dtype)
            given[name] = G, grad_bias, parts
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates.lr * factor
        self.optimizer.step()
        for name, (G, grad_bias, parts) in given.items():
            decision, twin = self.optimizer.routing[name], self.twins[name]
            assert tuple(decision.scores) == self.config.experts
            winners = tuple(self.config.experts.index(winner) for winner in decision.winners)
            assert list(winners) == sorted(set(winners))
            assert len(winners) == self.config.top_k
            expected = twin.step(G, grad_bias, factor=factor, winners=winners, factor_grads=parts)
            if self.config.score != "random":
                Pair._check_choice(winners, twin.best(expected.scores), expected.scores, near)
            assert tuple(decision.scores.values()) == pytest.approx(
                expected.scores, rel=max(relative, 1e-10), abs=1e-30
            )
            self.compare(name, relative)

    def compare(self, name: str, relative: float) -> None:
        tuner, twin, state = self.tuners[name], self.twins[name], self.optimizer.state
        A, B = self.factors(tuner)
        base = tuner.base_layer
        got = {"W": self.weight(base)}
        expected = {"W": twin.W["value"]}
        if base.bias is not None:
            got["b"], expected["b"] = base.bias.detach(), twin.b["value"]
        read = self.optimizer.lora_factors(name)
        for i, (A_i, B_i) in enumerate(self.parts(tuner)):
            got[f"A{i}"], expected[f"A{i}"] = A_i, twin.A[i]["value"]
            got[f"B{i}"], expected[f"B{i}"] = B_i, twin.B[i]["value"]
            got[f"read A{i}"], expected[f"read A{i}"] = read[i][0], twin.A[i]["value"]
            got[f"read B{i}"], expected[f"read B{i}"] = read[i][1], twin.B[i]["value"]
        for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            for i, (mA, mB) in enumerate(self.slices(state[A][key], state[B][key])):
                got[f"A{i} {moment}"], expected[f"A{i} {moment}"] = mA, twin.A[i][moment]
                got[f"B{i} {moment}"], expected[f"B{i} {moment}"] = mB, twin.B[i][moment]
            if not self.config.freeze_base:
                dense = state[base.weight][key]
                got[moment] = dense.t() if isinstance(base, Conv1D) else dense
                expected[moment] = twin.W[moment]
        assert (base.weight in state and bool(state[base.weight])) is not self.config.freeze_base
        for key, value in expected.items():
            error = (got[key].double() - value).abs().max()
            assert error <= relative * value.abs().max(), f"{name} {key}: {error}"


@st.composite
def pairs(draw, dtype: torch.dtype) -> tuple[AdapterPair, list[float], float]:
    freeze_base = draw(st.booleans())
    ranks = draw(st.lists(st.sampled_from((1, 2, 2, 4, 7)), min_size=1, max_size=3))
    scores = ("epd", "epd", "pfn", *FURTHER, "random", "lora")
    scores += () if freeze_base else ("full",)
    score = draw(st.sampled_from(scores))
    count = len(ranks)
    most = {"full": 1, "lora": count}.get(score, count + (not freeze_base))
    alpha = st.sampled_from((0.5, 4.0, 16.0))
    config = MoLFConfig(
        ranks=ranks,
        alpha=draw(st.one_of(alpha, st.tuples(*[alpha] * count))),
        use_rslora=draw(st.booleans()),
        score=score,
        top_k=draw(st.integers(1, most)),
        freeze_base=freeze_base,
    )
    lr = draw(st.sampled_from((1e-3, 3e-2)))
    rates = Rates(
        lr=lr,
        lora_lrs=tuple(
            lr * ratio
            for ratio in draw(st.tuples(*[st.sampled_from((0.0, 0.3, 1.0, 7.0))] * count))
        ),
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
            layers[f"layer_{index}"] = Conv1D(out_features, in_features)
        else:
            layers[f"layer_{index}"] = nn.Linear(in_features, out_features, bias=kind == "bias")
    alpha_of_peft = draw(st.sampled_from((1, sum(ranks), 32)))
    pair = AdapterPair(config, rates, layers, alpha_of_peft, seed, dtype)
    factors = draw(st.lists(st.sampled_from((0.0, 0.1, 0.7, 1.0)), min_size=STEPS, max_size=STEPS))
    return pair, factors, draw(st.sampled_from((1e-4, 1.0, 30.0)))


@settings(max_examples=60)
@given(case=pairs(torch.float64))
def test_float64_follows_the_twin(case):
    pair, factors, scale = case
    for factor in factors:
        pair.step(factor, scale, near=1e-10, relative=1e-12)


@settings(max_examples=60)
@given(case=pairs(torch.float32))
def test_float32_follows_the_twin_within_its_rounding(case):
    pair, factors, scale = case
    for factor in factors:
        pair.step(factor, scale, near=1e-4, relative=3e-5)


@pytest.mark.parametrize("freeze_base", [True, False])
def test_bfloat16_factors_are_rounded_once_per_step(freeze_base):
    config = MoLFConfig(ranks=(2, 3), alpha=4.0, top_k=2, freeze_base=freeze_base)
    rates = Rates(1e-3, (1e-3, 3e-3), 0.1, (0.01, 0.02), (0.9, 0.95), 1e-8)
    torch.manual_seed(0)
    layers = {"a": nn.Linear(8, 6)}
    pair = AdapterPair(config, rates, layers, 5, 0, torch.bfloat16, "nearest")
    twin, tuner = pair.twins["a"], pair.tuners["a"]
    for _ in range(8):
        pair.step(1.0, 1.0, near=1e-3, relative=2**-7)
        for i, (A, B) in enumerate(pair.parts(tuner)):
            c = config.scalings[i] / pair.s
            for stored, exact in ((A, twin.A[i]["value"]), (B * c, twin.B[i]["value"] * c)):
                best = (exact.bfloat16().double() - exact).abs()
                assert ((stored - exact).abs() <= best + 1e-5 * exact.abs().max()).all()
            twin.A[i]["value"], twin.B[i]["value"] = A, B  # go on from what is stored
        twin.W["value"] = pair.weight(tuner.base_layer).double()
        twin.b["value"] = tuner.base_layer.bias.detach().double()
    states = pair.optimizer.state.values()
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    assert {v.dtype for v in tensors} == {torch.float32}


def test_one_step_by_hand():
    """Two experts of rank 1 in an adapter of scaling 2; every number worked out on paper."""
    config = MoLFConfig(ranks=(1, 1), alpha=(4.0, 1.0), freeze_base=True)  # s_i = 4, 1
    settings = molf.peft_config(config, target_modules=["a"])
    settings.lora_alpha = 4  # s = 4 / 2 = 2, so c_i = s_i / s = 2, 1/2
    layer = nn.Linear(2, 2, bias=False).double()
    model = peft.get_peft_model(nn.ModuleDict({"a": layer}), settings)
    optimizer = MoLFAdamW.from_model(
        model, config, lr=0.1, lora_weight_decay=0.5, betas=(0.5, 0.75), eps=1e-12
    )
    eye = torch.eye(2).double()
    optimizer.set_lora_factors("a", [(eye[:1], eye[:, :1]), (eye[1:], eye[:, 1:])])
    tuner = model.base_model.model["a"]
    A, B = tuner.lora_A["default"].weight, tuner.lora_B["default"].weight
    assert torch.equal(A.detach(), eye)
    assert torch.equal(B.detach(), torch.tensor([[2.0, 0.0], [0.0, 0.5]]).double())  # c_i B_i
    W = layer.weight.detach().clone()
    A.grad = torch.tensor([[1.0, 0.0], [0.0, 8.0]]).double()
    B.grad = torch.tensor([[3.0, 0.0], [0.0, 2.0]]).double()

    optimizer.step()
    # grad B_0 = 2 * [3, 0] = [6, 0], grad B_1 = 1/2 * [0, 2] = [0, 1].
    # m^2 / sqrt(v) = |g| / 2:  expert 0: 0.1/4 (0.5 + 3) = 0.0875;  1: 0.1/4 (4 + 0.5) = 0.1125
    decision = optimizer.routing["a"]
    assert decision.winners == ("lora1_r1",)
    assert decision.scores == pytest.approx({"lora0_r1": 0.0875, "lora1_r1": 0.1125}, rel=1e-6)
    # Decay keeps 0.95; the direction is sign(g) times 0.1, for a stored column times c_1 = 1/2.
    assert A[1, 1].item() == pytest.approx(0.95 - 0.1)
    assert B[1, 1].item() == pytest.approx(0.5 * 0.95 - 0.5 * 0.1)
    assert torch.equal(A[0], eye[0])
    assert torch.equal(B[:, 0], 2 * eye[0])
    assert torch.equal(layer.weight, W)
