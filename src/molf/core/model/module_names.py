"""Names of a model's modules and parameters, without the prefixes of wrappers."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str, *, in_module: bool = True) -> str:
    """Return a module's or parameter's name without the prefixes that wrappers add.

    Args:
        name: The name.
        in_module: Whether a leading `module` belongs to a wrapper (`is_in_module`).
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if in_module and len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def is_in_module(model: nn.Module) -> bool:
    """Return whether the whole model is in an attribute `module`, as in DDP and DataParallel."""
    return holder_of(model) is not None


def holder_of(model: nn.Module) -> nn.Module | None:
    """Return the wrapper whose attribute `module` has the whole model; None without one."""
    # Elsewhere `module` is part of the model's own names: removing it could make two names equal.
    while len(children := dict(model.named_children())) == 1:
        name, child = next(iter(children.items()))
        if name == "module":
            return model
        if name not in _WRAPPERS:
            return None
        model = child
    return None


def is_peft_model(model: nn.Module) -> bool:
    """Return whether the model, without wrappers, is a `PeftModel`."""
    inner = unwrapped(model)
    return hasattr(inner, "peft_config") and "base_model" in dict(inner.named_children())


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that hold nothing else (DDP, compile, FSDP1)."""
    while len(children := dict(model.named_children())) == 1:
        name, child = next(iter(children.items()))
        if name not in ("module", *_WRAPPERS):
            break
        model = child
    return model


def cleaner(model: nn.Module) -> Callable[[str], str]:
    """Return a function that turns names of `model`'s modules and parameters into plain ones."""
    in_module, in_peft = is_in_module(model), is_peft_model(model)

    def clean(name: str) -> str:
        name = clean_name(name, in_module=in_module)
        if not in_peft:
            return name
        return name.removeprefix("base_model.model.").replace(".base_layer.", ".")

    return clean
