"""Which modules of a model a text never reaches, such as the vision tower of a multimodal model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from molf.core.places import is_linear
from molf.core.quantised import is_quantised


class Reach(NamedTuple):
    """What one forward pass does not touch.

    Attributes:
        unreached: Modules of which it uses nothing, the outermost of each branch.
        bypassed: Linear layers whose weights it reads without calling them, so that an adapter
            beside them would do nothing.
    """

    unreached: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()


def find_reach(model: nn.Module, run: Callable[[], object]) -> Reach:
    """Find out which modules of a model the forward pass does not use.

    A module is used if it is called, or if an operation reads one of its parameters. What chooses
    among like modules by the data (the experts of a mixture) may choose others the next time: an
    unused element of a list counts as reached if one of its own class is used. There are two
    passes: in evaluation mode nothing is dropped, and some layers are called in training otherwise.
    Modes and buffers are as they were afterwards.

    Args:
        model: A plain model.
        run: Runs it on a text.
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
            if not any(module.children()):
                stack.callback(module.register_forward_pre_hook(note).remove)
        stack.enter_context(torch.no_grad())
        try:
            evaluation_mode(model)
            with ParameterReads() as reads:
                run()
            used |= reads.seen
            called.clear()
            model.train()
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
    """Set evaluation mode, but for quantised layers: on a CPU, those would lose their gradient."""
    model.eval()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and is_quantised(weight):
            module.training = True


class ParameterReads(TorchDispatchMode):
    """Notes the parameters that operations read: a layer's weight may be used without the layer.

    Attributes:
        seen: They.
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
    """Names of the outermost unused modules in a used one."""
    children = dict(module.named_children())
    parts = {key: set(child.parameters()) for key, child in children.items()}
    chosen = {type(child) for key, child in children.items() if parts[key] & used}
    by_data = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    for key, child in children.items():
        inner = f"{name}.{key}" if name else key
        if parts[key] & used:
            yield from _unused(inner, child, used)
        elif parts[key] and not (by_data and type(child) in chosen):
            yield inner


def describe(model: nn.Module, reach: Reach, *, in_adapter: bool) -> str | None:
    """One line on what is left out of a training: how much, and where; None for nothing.

    Args:
        model: The model.
        reach: Of a text in it.
        in_adapter: Whether layers are adapted beside their weights.
    """
    lines = []
    if reach.unreached:
        inner = [model.get_submodule(name) for name in reach.unreached]
        layers = sum(is_linear(one) for module in inner for one in module.modules())
        size = sum(p.numel() for p in {p for module in inner for p in module.parameters()})
        lines.append(
            f"{layers} linear layers ({size:,} parameters in all) that a text does not reach, in "
            f"{_places(reach.unreached)}; they stay as they are."
        )
    if reach.bypassed and in_adapter:
        lines.append(
            f"{len(reach.bypassed)} linear layers that the model uses without calling them, where "
            f"an adapter would do nothing: {_places(reach.bypassed)}."
        )
    return f"Left out of the training: {' Also '.join(lines)}" if lines else None


def _places(names: tuple[str, ...]) -> str:
    """Names, those that differ in a number once."""
    places = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))
    return ", ".join(places[:4]) + (", ..." if len(places) > 4 else "")
