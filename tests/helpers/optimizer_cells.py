"""The cells of the table of invariants: a form, a storage, an executor, and how one is trained."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core_helpers import Conv1D, snapshot
from executors import EXECUTORS, Executor
from molf import AdamW
from offload_helpers import LateCarrier
from optimizer_forms import ADAPTERS, FORMS, STORAGES, build

# Triton cannot run beside the others: fused/test_fused.py starts a process that has it alone.
ONLY = os.environ.get("MOLF_TEST_EXECUTOR")
TABLE = {  # the storages that each executor has to show itself with
    "eager": ["float32", "float64", "exact", "stochastic", "nearest", "8bit"],
    "blocks": ["float32", "stochastic", "8bit"],
    "accelerator": ["float32", "exact"],
    "backward": ["float32", "8bit"],
    "offload": ["stochastic", "8bit"],
    "offload backward": ["exact"],
    "triton": ["float32", "exact"],  # one for each form: the interpreter is slow
}
# Two winners are much like one: they have to show themselves where tensors are looked at whole.
FORMS_OF = {executor: ["folded", "explicit", "frozen", "fft"] for executor in TABLE}
FORMS_OF |= {"eager": FORMS, "triton": ["folded", "fft"]}
LEFT_OUT = {  # storages that other forms show
    ("folded-top2", "eager"): ["float64", "exact", "stochastic", "nearest"],
    ("explicit", "eager"): ["nearest"],
    ("frozen", "eager"): ["float64", "nearest"],
    ("folded", "triton"): ["float32"],
    ("fft", "triton"): ["exact"],
}

Change = Callable[[Tensor], Tensor]


class AllKinds(nn.Module):
    """Every kind of tensor: routed with and without a bias, transposed, 8-bit, and not routed.

    Args:
        has_adapter: Whether PEFT, which knows transformers' `Conv1D` alone, has to adapt it.
        is_reversed: Whether the modules come in the opposite order.
    """

    def __init__(self, has_adapter: bool = False, is_reversed: bool = False) -> None:
        super().__init__()
        conv = transformers_conv1d() if has_adapter else Conv1D
        made = {
            "embed": nn.Embedding(11, 8),
            "up": nn.Linear(8, 12),
            "wide": nn.Linear(256, 16, bias=False),  # 4,096 elements in rows of 256: 8 bits
            "turned": conv(256, 16),
            "norm": nn.LayerNorm(9),
            "lm_head": nn.Linear(8, 11, bias=False),
        }
        for name in reversed(made) if is_reversed else made:
            self.add_module(name, made[name])
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(noise(f"weight {name}", parameter))


def transformers_conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return Conv1D


ROUTED = ["up", "wide", "turned"]


def noise(key: str, like: Tensor) -> Tensor:
    """Random numbers that depend on the key and the shape alone."""
    return _noise(key, like.shape).to(like, copy=True)


@lru_cache(maxsize=500)
def _noise(key: str, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass
class Training:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: AdamW

    def backward(
        self,
        step: int,
        *,
        changed: Mapping[str, Change] | None = None,
        without: Collection[str] = (),
        is_reversed: bool = False,
    ) -> Tensor:
        """Make the gradients of a step, which its number and the names decide; return the loss.

        Args:
            step: Its number.
            changed: What is done to the gradients of some parameters, by name.
            without: Names of parameters that get no gradient.
            is_reversed: Whether gradients come in the opposite order.
        """
        terms = []
        for name, parameter in self.trained.items():
            if name in without:
                continue
            grad = noise(f"step {step} {name}", parameter)
            grad = (changed or {}).get(name, lambda unchanged: unchanged)(grad)
            terms.append((parameter * grad).sum())
        loss = torch.stack([x.double() for x in (terms[::-1] if is_reversed else terms)]).sum()
        loss.backward()
        return loss.detach()

    def train(self, *steps: int, **how: Any) -> Training:
        """Take steps."""
        for step in steps:
            self.backward(step, **how)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def routing(self) -> dict[str, Any]:
        """The decisions of the last step; none without routing."""
        return dict(getattr(self.optimizer, "routing", {}))

    def bits(self) -> dict[str, object]:
        """Copies of all weights and states, by name."""
        return snapshot(self.model, self.optimizer)

    def values(self) -> dict[str, Tensor]:
        """Copies of the numbers that the weights and factors stand for, by name."""
        exact = self.optimizer.float32_weights()
        found = {name: exact.get(p, p.detach()).clone() for name, p in self.trained.items()}
        for group in self.optimizer.param_groups:
            if group["layer"] is not None:
                for number, (A, B) in enumerate(self.optimizer.lora_factors(group["layer"])):
                    found[f"{group['layer']} A{number}"] = A
                    found[f"{group['layer']} B{number}"] = B
        return found

    def layer_of(self, name: str) -> set[str]:
        """The names of the parameters that take a step together with one."""
        names = {parameter: one for one, parameter in self.trained.items()}
        for group in self.optimizer.param_groups:
            members = {names[p] for p in group["params"]}
            if group["layer"] is not None and name in members:
                return members
        return {name}


@dataclass
class Cell:
    """A form, in a storage, run by an executor that is in force."""

    form: str
    storage: str
    executor: Executor
    carrier: LateCarrier | None

    def check_place(self, *trainings: Training) -> None:
        """States are in host memory where they are offloaded, and no copy is on the device."""
        if self.carrier is None:
            return
        assert self.carrier.now == 0
        for training in trainings:
            states = training.optimizer.state.values()
            tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
            assert tensors
            assert all(self.carrier.holds(tensor) for tensor in tensors)

    def build(self, *, eager: bool = False, is_reversed: bool = False, **options: Any) -> Training:
        """A model and its optimizer before the first step, the same at every call.

        Args:
            eager: Whether torch operations run the step in place of the cell's executor.
            is_reversed: Whether the modules come in the opposite order.
            **options: Fields of `MoLFConfig`, and keywords of the optimizer.
        """
        executor = EXECUTORS["eager"] if eager else self.executor
        options = {"weight_decay": 0.1, **executor.options, **options}

        def model() -> nn.Module:
            return AllKinds(self.form in ADAPTERS, is_reversed).to(self.executor.device)

        built, optimizer = build(self.form, self.storage, model=model, **options)
        if executor.run_by is not None:
            optimizer.executor = executor.run_by
        return Training(built, optimizer)

    def with_weights_of(self, other: Training, **options: Any) -> Training:
        """As `build`, with the weights of another model."""
        built = self.build(**options)
        built.model.load_state_dict(other.model.state_dict())
        return built


def cells(
    *executors: str, forms: Iterable[str] = FORMS, storages: Iterable[str] = STORAGES
) -> pytest.MarkDecorator:
    """Parametrize a test by the cells of the table, or by those of some executors and storages."""
    found = [
        (form, storage, executor)
        for executor in ([ONLY] if ONLY else [name for name in TABLE if name != "triton"])
        if executor in (executors or TABLE)
        for form in FORMS_OF[executor]
        if form in forms
        for storage in TABLE[executor]
        if storage in storages and storage not in LEFT_OUT.get((form, executor), ())
    ]
    return pytest.mark.parametrize("cell", found, ids=" | ".join, indirect=True)
