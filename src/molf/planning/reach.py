"""Find modules that text input never reaches, such as a multimodal model's vision tower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from molf.core.model.linear_places import is_linear
from molf.core.model.quantised import is_quantised
from molf.shown import counted


class Reach(NamedTuple):
    """Modules that a forward pass does not use, or does not call.

    Attributes:
        unreached: Unused modules, the outermost of each branch.
        bypassed: Linear layers whose weights are read without a call, so that an adapter beside
            them would have no effect.
    """

    unreached: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()


def find_reach(model: nn.Module, run: Callable[[], object]) -> Reach:
    """Find the modules of a model that the forward pass does not use.

    A module is used if it is called, or if an operation reads one of its parameters. An element of
    a module list counts as used if another element of its class is. Modes and buffers are restored.

    Args:
        model: A plain model.
        run: Runs the model on a text.
    """
    used: set[nn.Parameter] = set()
    called: set[nn.Module] = set()
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def note(module: nn.Module, _: Any) -> None:
        called.add(module)
        used.update(module.parameters(recurse=False))

    with ExitStack() as stack:
        for module in model.modules():
            # Leaves alone: a container counts as used if a part of it is.
            if not any(module.children()):
                stack.callback(module.register_forward_pre_hook(note).remove)
        stack.enter_context(torch.no_grad())
        try:
            # Two passes: evaluation mode drops no layers; in training mode some layers read their
            # weights in another way. The second one decides which layers are called.
            for set_mode in (evaluation_mode, nn.Module.train):
                set_mode(model)
                called.clear()
                with ParameterReads() as reads:
                    run()
                used |= reads.seen
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                buffer.copy_(before)
    bypassed = (
        name
        for name, module in model.named_modules()
        if is_linear(module) and module not in called and reads.seen & set(module.parameters())
    )
    return Reach(tuple(_unused("", model, used)), tuple(bypassed))


def evaluation_mode(model: nn.Module) -> None:
    """Set evaluation mode, except for quantised layers, which would lose their gradient on CPU."""
    model.eval()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and is_quantised(weight):
            module.training = True


class ParameterReads(TorchDispatchMode):
    """Records the parameters that operations read, also without a call of their module.

    Attributes:
        seen: The parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[nn.Parameter] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            if isinstance(value, nn.Parameter):
                self.seen.add(value)
        return func(*args, **kwargs)


def _unused(name: str, module: nn.Module, used: set[nn.Parameter]) -> Iterator[str]:
    """Yield the names of the outermost unused modules in a used one."""
    children = dict(module.named_children())
    parts = {key: set(child.parameters()) for key, child in children.items()}
    # A mixture chooses among its experts by the data: those unused here may be used later.
    chosen = {type(child) for key, child in children.items() if parts[key] & used}
    by_data = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    for key, child in children.items():
        inner = f"{name}.{key}" if name else key
        if parts[key] & used:
            yield from _unused(inner, child, used)
        elif parts[key] and not (by_data and type(child) in chosen):
            yield inner


def describe(model: nn.Module, reach: Reach, *, in_adapter: bool) -> str | None:
    """Return one line on the modules that are not trained, or None if there are none.

    Args:
        model: The model.
        reach: The result of `find_reach` for it.
        in_adapter: Whether layers are adapted beside their weights.
    """
    lines = []
    if reach.unreached:
        inner = [model.get_submodule(name) for name in reach.unreached]
        layers = sum(is_linear(part) for module in inner for part in module.modules())
        size = sum(p.numel() for p in {p for module in inner for p in module.parameters()})
        lines.append(
            f"{counted(layers, 'linear layer')} ({size:,} parameters) that text input does not "
            f"use, in {_places(reach.unreached)}."
        )
    if reach.bypassed and in_adapter:
        lines.append(
            f"{counted(len(reach.bypassed), 'linear layer')} that the model uses without a call, "
            f"where an adapter has no effect: {_places(reach.bypassed)}."
        )
    return f"Left out of the training: {' Also '.join(lines)}" if lines else None


def _places(names: tuple[str, ...]) -> str:
    """Return the names as text; names that differ only in a number are given once."""
    places = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return ", ".join(places[:4]) + (", ..." if len(places) > 4 else "")
