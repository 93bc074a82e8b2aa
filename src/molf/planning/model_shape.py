"""Count a model's parameters, by part, and those that a method trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from molf.core.assignment.model import assigned_parameters, rehearse_assignment
from molf.core.model.coverage import warn_before_training
from molf.core.model.linear_layers import (
    LinearLayer,
    trainable_layers,
    warn_of_large_ranks,
)
from molf.errors import InputError
from molf.planning.quantised_base import quantise
from molf.planning.traffic import RoutedShape
from molf.planning.trainable import freeze, skeleton
from molf.planning.workload import Workload

# A head that is tied to the embeddings has no parameters of its own.
PARTS = ("embeddings", "head", "attention", "mlp", "norms", "other")

# Names of the modules of a decoder layer in transformers.
_ATTENTION = ("attn", "attention")
_MLP = ("mlp", "feed_forward", "ffn", "ff", "experts", "moe", "fc1", "fc2")


@dataclass(frozen=True)
class Part:
    """A part of the model, with the number of its parameters and of its trained ones."""

    name: str
    parameters: int
    trained: int


@dataclass(frozen=True)
class ModelShape:
    """Parameter counts and sizes of a model under a method.

    Attributes:
        model_type: The architecture's name in transformers.
        parameters: Parameters of the model itself.
        trained: All numbers that the optimizer updates, including LoRA factors.
        experts: The same by expert: `full` and the LoRA experts, or `adapter`, and `not routed`
            or `all`; of an assignment `full`, `adapter` and `rest`.
        layers: Linear layers that are routed or adapted; of an assignment those that are trained.
        tied: Whether head and embeddings share their weight.
        parts: The model's parameters by part.
        weight_bytes: Bytes of all parameters and buffers, including an adapter's.
        layer_bytes: Bytes of the largest decoder layer.
        outside_bytes: Bytes of the modules outside of decoder layers.
        outside: Parameters outside of decoder layers.
        routed: The layers whose experts are folded into them, in the optimizer's order.
        trained_tensors: Number of trained tensors of the model itself.
    """

    model_type: str
    parameters: int
    trained: int
    experts: dict[str, int]
    layers: int
    tied: bool
    parts: tuple[Part, ...]
    weight_bytes: int
    layer_bytes: int
    outside_bytes: int
    outside: int
    routed: tuple[RoutedShape, ...]
    trained_tensors: int

    def trained_share(self, names: Iterable[str]) -> float:
        """Return the share of the parameters of some parts that are trained."""
        parts = [part for part in self.parts if part.name in names]
        total = sum(part.parameters for part in parts)
        return sum(part.trained for part in parts) / total if total else 0.0


def describe_model(config: Any, workload: Workload) -> ModelShape:
    """Count a model's parameters without allocating any.

    Args:
        config: The model's transformers configuration.
        workload: The method and the type of the weights.

    Raises:
        InputError: The model cannot be made, or no layer can be adapted.

    Warns:
        UserWarning: A rank is large for a layer, or layers are not routed.
    """
    model = skeleton(config, workload.dtype)
    freeze(model, workload.unreached)
    # Before quantising, because the stand-ins are no linear layers.
    layers: list[LinearLayer] = []
    if workload.assignment is not None:
        base_trained = _assigned(model, config, workload)
        count = len(workload.assignment.full) + len(workload.assignment.lora)
    else:
        layers = _layers(model, workload)
        base_trained = _trained(model, layers, workload)
        count = len(layers)
    parts = {name: [0, 0] for name in PARTS}
    for part, parameter in _by_part(model):
        parts[part][0] += parameter.numel()
        parts[part][1] += parameter.numel() if parameter in base_trained else 0
    experts = _experts(layers, base_trained, workload)
    adapter = sum(experts.values()) - sum(p.numel() for p in base_trained)
    in_weights = 4 * adapter if workload.has_adapter else 0  # PEFT keeps factors in float32
    parameters = sum(p.numel() for p in model.parameters())
    in_layers = sum(p.numel() for p in _decoder_layers(model).parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if workload.quantised is not None:
        in_full = workload.assignment.full if workload.assignment else ()
        quantise(model, workload.quantised, unquantised={layer.name for layer in in_full})
    own = _bytes(model)
    decoder = _decoder_layers(model)
    sizes = [_bytes(layer) for layer in decoder]
    return ModelShape(
        model_type=config.model_type,
        parameters=parameters,
        trained=sum(experts.values()),
        experts=experts,
        layers=count,
        tied=tied,
        parts=tuple(Part(name, *counts) for name, counts in parts.items()),
        weight_bytes=own + in_weights,
        layer_bytes=max(sizes, default=0),
        outside_bytes=own - sum(sizes),
        outside=parameters - in_layers,
        routed=tuple(
            RoutedShape(
                layer.out_features,
                layer.in_features,
                layer.transposed,
                layer.bias is not None and layer.bias in base_trained,
            )
            for layer in layers
            if not workload.has_adapter
        ),
        trained_tensors=len(base_trained),
    )


def _assigned(model: nn.Module, config: Any, workload: Workload) -> set[nn.Parameter]:
    """Return the model's own parameters that an assignment trains."""
    assert workload.assignment is not None
    try:
        with_adapter = skeleton(config, workload.dtype)
        freeze(with_adapter, workload.unreached)
        rehearse_assignment(with_adapter, workload.assignment, use_dora=workload.use_dora)
        return assigned_parameters(model, workload.assignment, use_dora=workload.use_dora)
    except ValueError as error:
        raise InputError(str(error)) from error


def _layers(model: nn.Module, workload: Workload) -> list[LinearLayer]:
    if workload.config is None:
        return []
    config, in_adapter = workload.config, workload.method == "lora"
    try:
        layers = trainable_layers(model, config, in_adapter=workload.has_adapter)
    except ValueError as error:
        raise InputError(str(error)) from error
    warn_of_large_ranks(layers, max(config.ranks), in_adapter=in_adapter)
    warn_before_training(
        model, layers, config, in_adapter=in_adapter, has_adapter=workload.has_adapter
    )
    return layers


def _trained(model: nn.Module, layers: list[LinearLayer], workload: Workload) -> set[nn.Parameter]:
    """Return the model's own parameters that get gradients, without an adapter's."""
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if workload.method == "fft":
        return trainable
    if workload.method == "molf" and workload.config is not None:
        if workload.config.freeze_rest:
            return {layer.weight for layer in layers}
        return trainable
    if workload.method == "molf-e" and workload.config and not workload.config.freezes_rest:
        return trainable - {layer.weight for layer in layers}
    return set()


def _experts(
    layers: list[LinearLayer], trained: set[nn.Parameter], workload: Workload
) -> dict[str, int]:
    """Return the number of trained parameters by expert."""
    total = sum(parameter.numel() for parameter in trained)
    if workload.assignment is not None:
        in_full = sum(layer.weights for layer in workload.assignment.full)
        adapter = sum(
            layer.factors + (layer.shape[0] if workload.use_dora else 0)
            for layer in workload.assignment.lora
        )
        return {"full": in_full, "adapter": adapter, "rest": total - in_full}
    if workload.config is None:
        return {"all": total}
    size = sum(layer.in_features + layer.out_features for layer in layers)
    if workload.method == "lora":
        return {"adapter": sum(workload.config.ranks) * size}
    names = zip(workload.config.lora_experts, workload.config.ranks, strict=True)
    lora = {name: rank * size for name, rank in names}
    if workload.method == "molf-e":
        return lora | ({"not routed": total} if total else {})
    routed = {p for layer in layers for p in (layer.weight, layer.bias) if p in trained}
    full = sum(parameter.numel() for parameter in routed)
    return {"full": full, **lora, "not routed": total - full}


def _by_part(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter once, after the name of its part."""
    head = model.get_output_embeddings()
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield "head" if module is head else _part(module_name, module), parameter


def _part(name: str, module: nn.Module) -> str:
    """Return the part of a module, by its class, else by the names on its path from the inside."""
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "norm" in type(module).__name__.lower():
        return "norms"
    for word in reversed(name.lower().split(".")):
        if any(key in word for key in _ATTENTION):
            return "attention"
        if any(word == key or key in word.split("_") for key in _MLP) or "mlp" in word:
            return "mlp"
    return "other"


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers: other lists (experts, blocks of a vision tower) are smaller."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max(lists, key=_bytes, default=nn.ModuleList())


def _bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in (*module.parameters(), *module.buffers()))
