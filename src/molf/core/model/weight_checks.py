"""Checks of the weights of routed layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from molf.core.model.quantised import is_quantised, kind_of
from molf.core.storage.sharding import check_layout


def check_real_weight(name: str, weight: torch.Tensor) -> None:
    """Refuse a weight that the `full` expert cannot train: lazy, quantised, complex or sparse.

    A frozen complex or sparse weight passes: it is not trained.

    Raises:
        ValueError: With the layer's name and a remedy.
    """
    _check_not_lazy(name, weight)
    if is_quantised(weight):
        raise ValueError(
            f"Layer {name} is quantised ({kind_of(weight)}): the full expert needs real weights. "
            "Use freeze_base=True with molf.with_adapter (MoLF-Efficient), load the model "
            "unquantised, or put the layer into exclude_modules."
        )
    if not weight.requires_grad:
        return
    _check_not_complex(name, weight)
    if weight.layout != torch.strided:
        raise ValueError(
            f"Layer {name} has a sparse weight ({weight.layout}): experts change all elements. Use "
            "weight.to_dense(), or put the layer into exclude_modules."
        )


def check_adaptable_weight(name: str, weight: torch.Tensor, sides: tuple[Any, Any]) -> None:
    """Refuse a frozen weight that no adapter supports; quantised weights pass.

    Args:
        name: Name of the layer.
        weight: Weight of the layer.
        sides: (out, in) by the layer's attributes; None if it has none.

    Raises:
        ValueError: With the layer's name and a remedy.
    """
    _check_not_lazy(name, weight)
    _check_not_complex(name, weight)
    if not is_quantised(weight) and weight.dim() == 2:  # PEFT sizes the adapter by the attributes
        check_whole_weight(name, weight, sides)


def _check_not_lazy(name: str, weight: torch.Tensor) -> None:
    if is_lazy(weight):
        raise ValueError(
            f"Layer {name} is lazy: its weight has no shape before the first forward pass. Run "
            "one batch through the model first."
        )


def _check_not_complex(name: str, weight: torch.Tensor) -> None:
    if weight.is_complex():
        raise ValueError(
            f"Layer {name} has a complex weight ({weight.dtype}): experts are real matrices. Put "
            "the layer into exclude_modules."
        )


def check_whole_weight(name: str, weight: torch.Tensor, sides: tuple[Any, Any]) -> None:
    """Refuse a weight that is not the whole matrix of its layer.

    Args:
        name: Name of the layer.
        weight: Weight of the layer.
        sides: (out, in) by the layer's attributes; None if it has none.

    Raises:
        ValueError: With the layer's name and a remedy.
    """
    check_layout(f"The weight of layer {name}", weight)
    shape = tuple(weight.shape)
    if len(shape) != 2:
        raise ValueError(
            f"Layer {name} has a sharded weight, here of shape {shape} (DeepSpeed ZeRO-3, FSDP1): "
            "a step needs rows of it. Train with fully_shard (FSDP2), DDP or one process."
        )
    if None in sides or shape == sides:
        return
    # A common mistake of hand-written layers, with a remedy of its own.
    if shape == sides[::-1]:
        raise ValueError(
            f"Layer {name} has a transposed weight, of shape {shape} where its features say "
            f"{sides}. Store it as {sides}, or put the layer into exclude_modules."
        )
    raise ValueError(
        f"Layer {name} has a weight of shape {shape} where its features say {sides}. If the weight "
        "was replaced, set in_features and out_features to its shape; a part of a layer that "
        "several processes share cannot be routed."
    )


def sides_of(module: nn.Module) -> tuple[Any, Any]:
    """Return (out, in) by the attributes of a linear module; None if it has none."""
    return getattr(module, "out_features", None), getattr(module, "in_features", None)


def check_has_values(name: str, parameter: torch.Tensor) -> None:
    """Refuse a trained parameter without values.

    Raises:
        ValueError: With the parameter's name and a remedy.
    """
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name} is lazy: it has no shape before the first forward pass. Run one "
            "batch through the model before the optimizer is built."
        )
    if parameter.device.type == "meta":
        raise ValueError(
            f"Parameter {name} is on the meta device and has no values. Load the weights, or "
            "call model.to_empty(device=...) and initialise them, before the optimizer is built: "
            "both replace the parameters."
        )
