"""The linear layers of a plain model and the attributes that hold their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from molf.core.model.module_names import cleaner

# Projections of nn.MultiheadAttention. q, k and v are rows of one weight: one layer with one
# decision, as GPT-2's c_attn. (Three decisions would need three layers in one parameter with one
# state.) With `kdim` or `vdim` there are three weights and a common bias, which is not routed.
_PROJECTIONS = (
    ("in_proj", "in_proj_weight", "in_proj_bias"),
    ("q_proj", "q_proj_weight", ""),
    ("k_proj", "k_proj_weight", ""),
    ("v_proj", "v_proj_weight", ""),
)


class Place(NamedTuple):
    """Module and attributes of a linear layer's weight and bias.

    Attributes:
        name: Name of the layer.
        module: Module that holds the weight.
        owner: Name of the module.
        keys: Attribute names of weight and bias; the second may be empty.
        is_bypassed: Whether the model uses the weight without calling the layer, so that an adapter
            on it would have no effect.
    """

    name: str
    module: nn.Module
    owner: str
    keys: tuple[str, str]
    is_bypassed: bool = False

    @property
    def weight(self) -> object:
        """The value of the weight's attribute."""
        return getattr(self.module, self.keys[0])

    @property
    def bias(self) -> object:
        """The value of the bias's attribute; None where there is no such attribute."""
        return getattr(self.module, self.keys[1], None) if self.keys[1] else None

    @property
    def parameter_names(self) -> tuple[str, str]:
        """Names of both in the model."""
        weight, bias = (".".join(filter(None, (self.owner, key))) for key in self.keys)
        return weight, bias if self.bias is not None else ""


def linear_places(model: nn.Module) -> Iterator[Place]:
    """Yield the linear layers of a plain model, in its order."""
    clean = cleaner(model)
    bypassed = {
        module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }
    for raw, module in model.named_modules():
        name = clean(raw)
        if isinstance(module, nn.MultiheadAttention):
            for layer, weight, bias in _PROJECTIONS:
                if getattr(module, weight) is not None:
                    own = ".".join(filter(None, (name, layer)))
                    yield Place(own, module, name, (weight, bias), is_bypassed=True)
        elif is_linear(module):
            yield Place(name, module, name, ("weight", "bias"), module in bypassed)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers that a plain model calls, by clean name; these can be adapted."""
    return {place.name: place.module for place in linear_places(model) if not place.is_bypassed}


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is transformers' `Conv1D`, which stores its weight as [in, out]."""
    # By class name: core does not import transformers; `fully_shard` makes subclasses.
    return hasattr(module, "nf") and any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, quantised or not, as PEFT counts them."""
    return isinstance(module, nn.Linear) or is_conv1d(module)
