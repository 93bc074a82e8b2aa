"""What a method is to the rest of the run: a plan, a prepared model, and its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from molf.core.config import MoLFConfig
from molf.core.layers import (
    matching_linears,
    trainable_layers,
    warn_of_large_ranks,
    weights_of,
)
from molf.core.quantised import is_quantised
from molf.core.unrouted import coverage_of, warn_of_unrouted
from molf.errors import InputError
from molf.tasks.encoding import EncodedSamples
from molf.train.defaults import ADAPTERS
from molf.train.resolved import ResolvedSettings


class Layer(NamedTuple):
    """A linear layer that a method routes or adapts, without its weights.

    Attributes:
        name: The module's name in the model.
        in_features: Size of its input.
        out_features: Size of its output.
        transposed: Whether the weight is stored as [in, out] (GPT-2's `Conv1D`).
    """

    name: str
    in_features: int
    out_features: int
    transposed: bool

    def lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA factors of this rank: A [rank, in] and B [out, rank]."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class TrainingData:
    """What a method may want to know of the training before it begins.

    Attributes:
        samples: The encoded training samples.
        steps: Optimizer steps that will be taken.
    """

    samples: EncodedSamples
    steps: int


@dataclass(frozen=True)
class Plan:
    """What a method will train.

    Attributes:
        layers: The layers that are routed or adapted; empty for fft.
        trained_parameters: How many numbers it trains.
        details: Further facts, for the record.
    """

    layers: tuple[Layer, ...]
    trained_parameters: int
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return the plan for a run's `config.yaml`."""
        return {
            "adapted_layers": len(self.layers),
            "trained_parameters": self.trained_parameters,
            **self.details,
        }


@dataclass(frozen=True)
class Prepared:
    """A model ready for the trainer, and what has to happen around and after the training.

    Attributes:
        model: The model to train, wrapped if there is an adapter.
        optimizer: The trainer's `optimizer_cls_and_kwargs`.
        optimizer_class: What the trainer must end up with.
        layers: Names of the layers that are routed.
        trained_parameters: How many numbers are trained.
        experts: What the optimizer routes between; empty without routing.
        save_adapter: Writes the trained model's adapter into a directory; None where there is none,
            or more than the adapter is trained.
        rates: Further learning rates, as multiples of the one that the trainer logs.
        penalty: A term of the loss beside the task's, once for each optimizer step.
        measure: What is to be logged beside the trainer's figures.
        callbacks: What else happens at the trainer's steps.
    """

    model: Any
    optimizer: tuple[Any, dict[str, Any]]
    optimizer_class: type[torch.optim.Optimizer]
    layers: tuple[str, ...]
    trained_parameters: int
    experts: tuple[str, ...] = ()
    save_adapter: Callable[[Any, Path], None] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    penalty: Callable[[], Tensor] | None = None
    measure: Callable[[], dict[str, float]] = dict
    callbacks: tuple[TrainerCallback, ...] = ()


class Method(ABC):
    """One way to train."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Raise `InputError` if a model of these shapes cannot be trained so."""
        find_adapted_layers(skeleton, settings)

    @abstractmethod
    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """Say what will be trained, or raise `InputError`."""

    @abstractmethod
    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Make the model ready."""


def find_adapted_layers(model: Any, settings: ResolvedSettings) -> tuple[Layer, ...]:
    """The layers that the settings' patterns choose; empty for fft.

    Raises:
        InputError: A pattern matches nothing, or no layer is left.

    Warns:
        UserWarning: As `molf.core.layers.find_layers`, by what the method does.
    """
    config = settings.method_config
    if config is None:
        return ()
    try:
        linears: dict[str, Any] = dict(matching_linears(model, config))
        if any(is_quantised(module.weight) for module in linears.values()):
            # Their weights are packed and the modules never transposed, whatever they replaced.
            return tuple(
                Layer(name, module.in_features, module.out_features, False)
                for name, module in linears.items()
            )
        found = trainable_layers(model, config, in_adapter=settings.has_adapter)
    except ValueError as error:
        raise InputError(str(error)) from error
    in_adapter = settings.method in ADAPTERS
    if not in_adapter:  # an adapter's rank is known to its method
        warn_of_large_ranks(found, max(config.ranks))
    trains_rest = not in_adapter and not config.freezes_rest
    coverage = coverage_of(
        model,
        weights_of(found),
        len(found),
        trains_rest=trains_rest,
        uses_adapter=settings.has_adapter,
    )
    warn_of_unrouted(coverage, in_adapter=in_adapter)
    return tuple(Layer(x.name, x.in_features, x.out_features, x.transposed) for x in found)


def config_of(settings: ResolvedSettings) -> MoLFConfig:
    """The settings' experts or adapter; only for methods that have one."""
    config = settings.method_config
    if config is None:
        raise ValueError(f"method={settings.method} has no adapter.")
    return config


def count_trainable(model: Any) -> int:
    """How many numbers of a model are trained; tied weights count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
