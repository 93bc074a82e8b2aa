"""The interface of training methods: a plan, and a prepared model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback

from molf.core.config import MoLFConfig
from molf.core.model.coverage import warn_before_training
from molf.core.model.linear_layers import (
    matching_linears,
    trainable_layers,
    warn_of_large_ranks,
)
from molf.core.model.quantised import is_quantised
from molf.data.encoding import EncodedSamples
from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS
from molf.job.settings.resolved import ResolvedSettings


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
        """Return the number of parameters of the factors A `[rank, in]` and B `[out, rank]`."""
        return rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class TrainingData:
    """The data and length of a training.

    Attributes:
        samples: The encoded training samples.
        steps: Number of optimizer steps.
        packed: Positions of the samples in each packed row; None if each sample is a row.
    """

    samples: EncodedSamples
    steps: int
    packed: Sequence[Sequence[int]] | None = None

    @property
    def rows(self) -> int:
        """Number of rows, which batches and epochs count: packed rows, or samples."""
        return len(self.samples.input_ids if self.packed is None else self.packed)

    def row_lengths(self) -> list[int]:
        """Return the number of tokens of each row; tokenizes all samples."""
        lengths = self.samples.lengths()
        if self.packed is None:
            return lengths
        return [sum(lengths[position] for position in row) for row in self.packed]


@dataclass(frozen=True)
class Plan:
    """The layers and parameters that a method will train.

    Attributes:
        layers: The layers that are routed or adapted; empty for fft.
        trained_parameters: Number of trained parameters.
        details: Further entries of the record.
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
    """A model ready for the trainer, with its optimizer, callbacks and log figures.

    Attributes:
        model: The model to train, wrapped if there is an adapter.
        optimizer: The trainer's `optimizer_cls_and_kwargs`.
        optimizer_class: The class of the optimizer that the trainer must create.
        layers: Names of the routed layers.
        trained_parameters: Number of trained parameters.
        experts: Names of the routed experts; empty without routing.
        save_adapter: Writes the trained model's adapter into a directory; None if there is no
            adapter, or if other weights are trained as well.
        rates: Further learning rates, as multiples of the one that the trainer logs.
        penalty: An additional loss, added once per optimizer step.
        measure: Returns further figures for the log.
        callbacks: Further callbacks of the trainer.
        attach: Called with the model in shards that is trained in the place of `model`, with the
            same names.
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
    attach: Callable[[Any], None] = lambda model: None


class Method(ABC):
    """A training method."""

    def check(self, skeleton: Any, settings: ResolvedSettings) -> None:
        """Raise `InputError` if the method cannot train a model of these shapes."""
        find_adapted_layers(skeleton, settings)

    @abstractmethod
    def plan(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
        """Return the plan, or raise `InputError`."""

    @abstractmethod
    def prepare(self, model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
        """Prepare the model for training, in place."""


def find_adapted_layers(model: Any, settings: ResolvedSettings) -> tuple[Layer, ...]:
    """Return the layers that match the settings' patterns; empty for fft.

    Raises:
        InputError: A pattern matches nothing, or no layer is left.

    Warns:
        UserWarning: A rank is large for a layer, or layers are not routed.
    """
    config = settings.method_config
    if config is None:
        return ()
    try:
        # Not `trainable_layers`, which rejects quantised weights; an adapter supports them.
        linears: dict[str, Any] = dict(matching_linears(model, config))
        if any(is_quantised(module.weight) for module in linears.values()):
            # Quantised weights are packed. Their modules are never transposed, not even GPT-2's.
            return tuple(
                Layer(name, module.in_features, module.out_features, False)
                for name, module in linears.items()
            )
        found = trainable_layers(model, config, in_adapter=settings.has_adapter)
    except ValueError as error:
        raise InputError(str(error)) from error
    in_adapter = settings.method in ADAPTERS
    if not in_adapter:  # Adapter warns itself, as it chooses the rank
        warn_of_large_ranks(found, max(config.ranks))
    warn_before_training(
        model, found, config, in_adapter=in_adapter, has_adapter=settings.has_adapter
    )
    return tuple(Layer(x.name, x.in_features, x.out_features, x.transposed) for x in found)


def config_of(settings: ResolvedSettings) -> MoLFConfig:
    """Return the experts or adapter of the settings; only for methods with one."""
    config = settings.method_config
    if config is None:
        raise ValueError(f"method={settings.method} has no adapter.")
    return config


def has_values(model: Any) -> bool:
    """Return whether a model has values: of models in shards, that of rank 0 alone."""
    return not any(parameter.is_meta for parameter in model.parameters())


def count_trainable(model: Any) -> int:
    """Return the number of trained parameters of a model; tied weights count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
