"""Where a plain model keeps the weights of its linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from molf.core.module_names import cleaner

# Of nn.MultiheadAttention. q, k and v are rows of one weight, which is one layer, as GPT-2's c_attn
# is; where keys or values have a size of their own there are three weights, and a common bias.
_PROJECTIONS = (
    ("in_proj", "in_proj_weight", "in_proj_bias"),
    ("q_proj", "q_proj_weight", ""),
    ("k_proj", "k_proj_weight", ""),
    ("v_proj", "v_proj_weight", ""),
)


class Place(NamedTuple):
    """Where the weight of a linear layer is kept.

    Attributes:
        name: The layer's name.
        module: What holds the weight.
        owner: The module's name.
        keys: The attributes that weight and bias are; that of the bias may be empty.
        is_bypassed: Whether the model uses the weight without calling the layer.
    """

    name: str
    module: nn.Module
    owner: str
    keys: tuple[str, str]
    is_bypassed: bool = False

    @property
    def weight(self) -> object:
        """What the weight's attribute holds."""
        return getattr(self.module, self.keys[0])

    @property
    def bias(self) -> object:
        """What the bias's attribute holds; None where there is no such attribute."""
        return getattr(self.module, self.keys[1], None) if self.keys[1] else None

    @property
    def parameter_names(self) -> tuple[str, str]:
        """Names of both in the model."""
        weight, bias = (".".join(filter(None, (self.owner, key))) for key in self.keys)
        return weight, bias if self.bias is not None else ""


def linear_places(model: nn.Module) -> Iterator[Place]:
    """The linear layers of a plain model, in its order."""
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
    """Every linear layer that a plain model calls, by clean name: what can have an adapter."""
    return {place.name: place.module for place in linear_places(model) if not place.is_bypassed}


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, which stores its weight as [in, out]."""
    # By its name: core imports torch alone.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, quantised or not, as PEFT counts them."""
    return isinstance(module, nn.Linear) or is_conv1d(module)
