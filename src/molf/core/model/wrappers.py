"""Checks of wrappers for several devices that hold a model (DDP, DataParallel, FSDP1)."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from molf.core.model.module_names import cleaner, holder_of
from molf.core.storage.sharding import FLATTENED, ShardingError


def check_not_in_module(model: nn.Module) -> None:
    """Refuse a new adapter or an assignment for a model that is in an attribute `module`.

    Raises:
        ValueError: With the class of the wrapper.
    """
    # The adapter would be outside of the wrapper: DDP would not average its gradients, and its
    # saved names would not be those of the plain model.
    if (holder := holder_of(model)) is not None:
        kind = type(holder).__name__
        raise ValueError(
            f"The model is inside a {kind}, in its attribute module. Give model.module, and wrap "
            f"the result in {kind} afterwards."
        )


def check_ddp_waits_for(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """Refuse to freeze a parameter whose gradient DDP waits for; its second step would fail.

    Args:
        model: The model, in any wrapper.
        trained: Its parameters that stay trained.

    Raises:
        ValueError: With the first such parameter.
    """
    clean = cleaner(model)
    for prefix, module in model.named_modules():
        if not isinstance(module, DistributedDataParallel):
            continue
        if module.find_unused_parameters or module.static_graph:
            continue
        for name, parameter in module.named_parameters(prefix=prefix):
            if parameter.requires_grad and parameter not in trained:
                raise ValueError(
                    f"The optimizer freezes {clean(name)}, whose gradient DistributedDataParallel "
                    "waits for. Build the optimizer before the model is wrapped."
                )


def check_not_flattened(name: str, model: nn.Module) -> None:
    """Refuse a layer whose weight is a part of a flat parameter of FSDP1.

    Args:
        name: Name of the layer, whose weight is no parameter.
        model: The model.

    Raises:
        ShardingError: The model is wrapped by FSDP1.
    """
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        raise ShardingError(f"The weight of layer {name} {FLATTENED}")
