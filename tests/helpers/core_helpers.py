"""What the core tests share: small models, gradients, snapshots, and pairs with the twin."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molf.core.adamw import AdamW
from molf.core.config import MoLFConfig
from molf.core.execute.eager import Eager
from molf.core.optimizer import MoLFAdamW
from molf.core.reference import best, effective_weight, new_slot
from reference_scores import ScoredReference


class Conv1D(nn.Module):
    """GPT-2's transposed linear layer; the core knows transformers' class by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.5))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class TinyModel(nn.Module):
    """Embedding, two linear layers (one with a bias), a norm, and a head named `lm_head`."""

    def __init__(self, vocabulary: int = 11, width: int = 6, hidden: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.down = nn.Linear(hidden, width, bias=False)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.down(self.norm(self.up(x)).tanh()))


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyModel:
    torch.manual_seed(seed)
    return TinyModel().to(dtype)


def tiny_optimizer(model: nn.Module, **kwargs) -> MoLFAdamW:
    """Build the optimizer with small ranks; keywords of `MoLFConfig` and of `from_model`."""
    names = MoLFConfig.__dataclass_fields__
    config = {key: kwargs.pop(key) for key in list(kwargs) if key in names}
    config = {"ranks": (2, 3), "alpha": 4.0, **config}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Rank|Trained weights are)")
        return MoLFAdamW.from_model(model, MoLFConfig(**config), **{"lr": 1e-2, **kwargs})


def as_on_an_accelerator(optimizer: AdamW) -> AdamW:
    """Let the optimizer take the steps that it takes where the host would wait for the device."""
    optimizer.executor = Eager(can_read=lambda device: False)
    return optimizer


def backward(model: nn.Module, seed: int) -> Tensor:
    """Fill the gradients of a `TinyModel` from a batch that depends on `seed` alone."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.get_submodule("embed").num_embeddings
    ids = torch.randint(vocabulary, (4, 5), generator=generator)
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), ids.roll(1, 1).flatten())
    loss.backward()
    return loss.detach()


def feed(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Give every parameter a random gradient that depends on `seed` and its position alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.grad = grad.to(parameter)


def run(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[int]) -> None:
    """Take one step for each batch."""
    for batch in batches:
        backward(model, batch)
        optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Copies of every weight and every entry of the optimizer's state, by name."""
    found: dict[str, object] = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.clone() if isinstance(value, Tensor) else value
    return found


def assert_same_bits(got: dict[str, object], expected: dict[str, object]) -> None:
    """Compare two snapshots: same keys, dtypes, shapes and bits (-0.0 is not 0.0)."""
    assert got.keys() == expected.keys()
    for key, value in got.items():
        other = expected[key]
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, key
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            one, two = (x.contiguous().view(bits[x.element_size()]) for x in (value, other))
            assert torch.equal(one, two), key
        else:
            assert type(value) is type(other), key
            assert value == other, key


@dataclass
class Rates:
    """Hyper-parameters of `from_model`, one entry per LoRA expert where they differ."""

    lr: float
    lora_lrs: tuple[float, ...]
    weight_decay: float
    lora_weight_decays: tuple[float, ...]
    betas: tuple[float, float]
    eps: float


class TwinDecision(NamedTuple):
    """The reference's winners and scores in one step, by index."""

    winners: tuple[int, ...]
    scores: tuple[float, ...]


class Twin:
    """The reference optimizer (`molf.core.reference`) over one layer, in float64.

    Args:
        W: [out, in].
        factors: (A_i, B_i) of each LoRA expert.
        config: The method's settings; `score="random"` follows the winners that `step` is given.
        rates: The hyper-parameters.
        bias: [out], or None.
    """

    def __init__(
        self,
        W: Tensor,
        factors: Sequence[tuple[Tensor, Tensor]],
        config: MoLFConfig,
        rates: Rates,
        bias: Tensor | None = None,
    ) -> None:
        self.layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = ScoredReference(
                nn.ModuleDict({"layer": self.layer}),
                config,
                lr=rates.lr,
                lora_lr=rates.lora_lrs,
                weight_decay=rates.weight_decay,
                lora_weight_decay=rates.lora_weight_decays,
                betas=rates.betas,
                eps=rates.eps,
            )
        self.rates = rates
        self.state = {
            "W": new_slot(W),
            "b": None if bias is None else new_slot(bias),
            "A": [new_slot(A) for A, _ in factors],
            "B": [new_slot(B) for _, B in factors],
        }
        self.W, self.b, self.A, self.B = self.state.values()
        self.optimizer.state[self.layer.weight] = self.state

    def effective_weight(self) -> Tensor:
        """`W + sum_i s_i B_i A_i`."""
        return effective_weight(self.state, self.optimizer.config.scalings)

    def set_effective_weight(self, value: Tensor) -> None:
        """Move W so that `W_eff` becomes `value`: the effect of storing it in fewer bits."""
        self.W["value"] = self.W["value"] + (value - self.effective_weight())

    @torch.no_grad()
    def step(
        self,
        grad: Tensor,
        grad_bias: Tensor | None = None,
        *,
        factor: float = 1.0,
        winners: Sequence[int],
        factor_grads: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> TwinDecision:
        """Take one step with these winners; rates are scaled by `factor`."""
        self.layer.weight.grad = grad
        if self.layer.bias is not None:
            self.layer.bias.grad = grad_bias
        group = self.optimizer.param_groups[0]
        group["lr"] = self.rates.lr * factor
        decision = self.optimizer.step_layer(group, winners, factor_grads)
        torch.testing.assert_close(
            self.layer.weight.detach(), self.effective_weight(), rtol=0, atol=0
        )
        return TwinDecision(tuple(winners), tuple(decision.scores.values()))

    def best(self, scores: Sequence[float]) -> tuple[int, ...]:
        """The winners that the reference would choose."""
        return best(scores, self.optimizer.config, "layer", 0)


class Pair:
    """The fast optimizer over a model of linear layers, beside one reference twin per layer.

    Args:
        layers: The model's modules by name; it has nothing else.
        config: The method's settings.
        rates: The hyper-parameters.
        seed: Of the experts' B factors, which do not start at zero; None leaves them there.
        **options: Further keywords of `from_model`.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        config: MoLFConfig,
        rates: Rates,
        seed: int | None,
        **options,
    ) -> None:
        self.layers, self.config, self.rates = layers, config, rates
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.optimizer = MoLFAdamW.from_model(
                nn.ModuleDict(layers),
                config,
                lr=rates.lr,
                lora_lr=rates.lora_lrs,
                weight_decay=rates.weight_decay,
                lora_weight_decay=rates.lora_weight_decays,
                betas=rates.betas,
                eps=rates.eps,
                **options,
            )
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for name in layers:
                factors = [
                    (A, 0.3 * torch.randn(B.shape, generator=generator, dtype=torch.float64))
                    for A, B in self.optimizer.lora_factors(name)
                ]
                self.optimizer.set_lora_factors(name, factors)
        self.twins = {name: self._twin(name) for name in layers}

    def _twin(self, name: str) -> Twin:
        module = self.layers[name]
        factors = [(A.double(), B.double()) for A, B in self.optimizer.lora_factors(name)]
        parts = zip(self.config.scalings, factors, strict=True)
        W = self.weight(name).double() - sum(s * B @ A for s, (A, B) in parts)
        bias = None if module.bias is None else module.bias.detach().double()
        return Twin(W, factors, self.config, self.rates, bias)

    def weight(self, name: str) -> Tensor:
        """The layer's weight now, as [out, in]."""
        weight = self.layers[name].weight.detach()
        return weight.t() if isinstance(self.layers[name], Conv1D) else weight

    def step(
        self, grads: dict[str, tuple[Tensor, Tensor | None] | None], factor: float, near: float
    ) -> dict[str, tuple[TwinDecision, tuple[float, ...]]]:
        """Take the step on both sides and check the winners.

        The twin follows the fast side's winners. Where they differ from its own choice, the
        scores must differ, by no more than the relative distance `near`.

        Args:
            grads: ([out, in], [out] or None) by layer, or None for a layer without a gradient.
            factor: What the schedule multiplies the rates by.
            near: What counts as a near-tie.

        Returns:
            Of each layer that took part: the twin's decision and the fast side's scores.
        """
        for name, module in self.layers.items():
            given = grads[name]
            module.zero_grad()
            if given is not None:
                grad, grad_bias = given
                grad = grad.t() if isinstance(module, Conv1D) else grad
                module.weight.grad = grad.to(module.weight.dtype).contiguous()
                if grad_bias is not None:
                    module.bias.grad = grad_bias.to(module.bias.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates.lr * factor
        self.optimizer.step()

        taking_part = [name for name, given in grads.items() if given is not None]
        assert list(self.optimizer.routing) == [n for n in self.layers if n in taking_part]
        decisions = {}
        for name in taking_part:
            decision = self.optimizer.routing[name]
            assert tuple(decision.scores) == self.config.experts
            winners = tuple(self.config.experts.index(winner) for winner in decision.winners)
            assert list(winners) == sorted(set(winners))
            assert len(winners) == self.config.top_k
            twin = self.twins[name]
            expected = twin.step(*grads[name], factor=factor, winners=winners)
            if self.config.score != "random":
                self._check_choice(winners, twin.best(expected.scores), expected.scores, near)
            decisions[name] = expected, tuple(decision.scores.values())
        return decisions

    @staticmethod
    def _check_choice(
        winners: tuple[int, ...], best: tuple[int, ...], scores: Sequence[float], near: float
    ) -> None:
        taken, passed_over = set(winners) - set(best), set(best) - set(winners)
        for one in taken:
            for other in passed_over:
                distance = abs(scores[one] - scores[other])
                assert 0 < distance <= near * max(scores[one], scores[other]), (
                    f"winners {winners} instead of {best} with scores {scores}"
                )


def trainer_arguments(folder, max_steps: int, **options):
    """Arguments of a short training by transformers' Trainer on the CPU, two examples a step."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
