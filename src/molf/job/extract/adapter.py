"""A PEFT adapter from factors of linear layers, with changed modules beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from molf.core.model.adapted_layers import adapter_layers
from molf.core.model.peft_model import add_adapter, exactly
from molf.errors import InputError
from molf.job.extract.change import Factors, LayerChange, RestChange, conv1d_only, rounded

_ADAPTER = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Kept:
    """The part of the rest that an adapter can hold beside its factors.

    Attributes:
        modules: Full names of modules that are kept whole (`modules_to_save`).
        biases: Names of biases of adapted layers, which are kept with them.
        names: Names of all parameters in both.
    """

    modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()


def keepable(base: nn.Module, layers: Iterable[LayerChange], rest: Iterable[RestChange]) -> Kept:
    """Return the changed parameters of the rest that PEFT can keep.

    A module is kept whole, so one that holds an adapted layer cannot be kept. Both modules of a
    tied parameter are kept, each with a copy.
    """
    adapted = {layer.name for layer in layers}
    modules: dict[str, None] = {}
    biases, names = [], set()
    for one in rest:
        if one.module in adapted:
            if one.name == f"{one.module}.bias":
                biases.append(one.name)
                names.add(one.name)
            continue
        owners = [one.module, *(name.rpartition(".")[0] for name in one.also)]
        is_inside = any(name.startswith(f"{owner}.") for owner in owners for name in adapted)
        if all(owners) and not is_inside:
            modules |= dict.fromkeys(owners)
            names.add(one.name)
    return Kept(tuple(modules), tuple(biases), frozenset(names))


def kept_values(tuned: nn.Module, kept: Kept, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the trained values that an adapter of a type keeps, by name of the parameter."""
    inside = tuple(f"{module}." for module in kept.modules)
    return {
        name: rounded(parameter.detach().clone(), dtype)
        for name, parameter in tuned.named_parameters(remove_duplicate=False)
        if name in kept.biases or name.startswith(inside)
    }


def make_adapter(
    base: Any,
    factors: Mapping[str, Factors],
    layers: Iterable[LayerChange],
    rank: int,
    kept: Kept,
    values: Mapping[str, Tensor],
) -> Any:
    """Return the base with an adapter that holds the factors, and the kept modules.

    Args:
        base: The plain base model; its layers are wrapped in place.
        factors: The factors by layer; their product is added without a scaling.
        layers: The same layers.
        rank: The rank; layers with smaller factors have an entry in `rank_pattern`.
        kept: Parameters that are stored beside the factors.
        values: The result of `kept_values`.

    Raises:
        InputError: PEFT cannot adapt one of the layers.
    """
    smaller = {exactly(layer.name): layer.rank for layer in layers if layer.rank != rank}
    in_out = conv1d_only(base, set(factors))

    def make_config(**chosen: Any) -> LoraConfig:
        return LoraConfig(
            r=rank,
            lora_alpha=rank,  # a scaling of 1
            rank_pattern=smaller,
            alpha_pattern=smaller,
            fan_in_fan_out=in_out,
            bias="lora_only" if kept.biases else "none",
            modules_to_save=list(kept.modules) or None,
            **chosen,
        )

    try:
        with warnings.catch_warnings():
            # PEFT finds layers of [in, out] itself. Of tied weights each module keeps a copy.
            warnings.simplefilter("ignore")
            remedy = "their change cannot be extracted"
            model = add_adapter(base, list(factors), make_config, _ADAPTER, remedy=remedy)
    except ValueError as error:
        raise InputError(str(error)) from error
    tuners = adapter_layers(model)
    if {name.removeprefix(_PREFIX) for name in tuners} != set(factors):
        raise InputError("PEFT cannot hold this change: it adapts other layers than those named.")
    with torch.no_grad():
        for name, tuner in tuners.items():
            one: Any = factors[name.removeprefix(_PREFIX)]
            layer: Any = tuner
            layer.lora_A[_ADAPTER].weight.copy_(one.A)
            layer.lora_B[_ADAPTER].weight.copy_(one.B)
        for name in kept.biases:
            model.get_submodule(_PREFIX + name.removesuffix(".bias")).get_base_layer().bias.copy_(
                values[name]
            )
        for module in kept.modules:
            copy = model.get_submodule(f"{_PREFIX}{module}").modules_to_save[_ADAPTER]
            for name, parameter in copy.named_parameters():
                parameter.copy_(values[f"{module}.{name}"])
    return model.eval()


def write_adapter(model: Any, base_name: str, dtype: torch.dtype, directory: Path) -> None:
    """Write the adapter's weights and configuration, as PEFT loads them.

    Args:
        model: The result of `make_adapter`.
        base_name: Directory or Hub id of the base.
        dtype: Type of all weights.
        directory: An empty directory.

    Raises:
        ValueError: A number overflows the type.
    """
    # "auto" would look up the base's vocabulary.
    state: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=_ADAPTER, save_embedding_layers=False
    )
    tensors = {name: value.to("cpu", dtype).contiguous().clone() for name, value in state.items()}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ValueError(f"the adapter has numbers that do not fit {dtype}")
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = model.peft_config[_ADAPTER]
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    config.save_pretrained(directory)
