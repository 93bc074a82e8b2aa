"""The linear layers of a model and all its other parameters, by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn

from molf.core.config import MoLFConfig
from molf.core.model.linear_layers import head_name, is_in_head, matches
from molf.core.model.linear_places import Place, is_conv1d, linear_places
from molf.core.model.module_names import cleaner, unwrapped
from molf.core.model.quantised import is_quantised


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's layers.

    Attributes:
        layers: (out, in) of every linear layer outside of the head, in the model's order.
        heads: The same of the head: it is a layer only if a pattern names it.
        rest: Names of all other parameters, the weight of a head too; a tied one has several.
        model: A description of the model.
    """

    layers: dict[str, tuple[int, int]]
    heads: dict[str, tuple[int, int]]
    rest: tuple[str, ...]
    model: str = ""

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Return the layout of a model, plain or with adapters, with or without values."""
        clean, head = cleaner(model), head_name(model)
        tuners = {
            clean(name) for name, m in model.named_modules() if hasattr(m, "adapter_layer_names")
        }
        layers: dict[str, tuple[int, int]] = {}
        heads: dict[str, tuple[int, int]] = {}
        weights: set[str] = set()
        for place in linear_places(model):
            if not isinstance(place.weight, Tensor) or _is_adapters(place.name, tuners):
                continue
            name = place.name.removesuffix(".base_layer")
            # As `MoLFConfig` leaves out by default, also in models that are not transformers'.
            if is_in_head(name, head) or matches(name, MoLFConfig.exclude_modules):
                heads[name] = shape_of(place)
            else:
                layers[name] = shape_of(place)
                weights.add(place.parameter_names[0].replace(".base_layer.", "."))
        names = (clean(name) for name, _ in model.named_parameters(remove_duplicate=False))
        rest = [name for name in names if name not in weights and not _is_adapters(name, tuners)]
        return cls(layers, heads, tuple(dict.fromkeys(rest)), _described(model))


def _is_adapters(name: str, tuners: Collection[str]) -> bool:
    """Return whether a module or parameter belongs to an adapter, by its clean name."""
    parts = name.split(".")
    inside = (".".join(parts[:end]) for end in range(1, len(parts)))
    found = next((tuner for tuner in inside if tuner in tuners), None)
    # `clean` has removed `base_layer` from the names of parameters, not from those of modules.
    return found is not None and name[len(found) + 1 :] not in ("base_layer", "weight", "bias")


def shape_of(place: Place) -> tuple[int, int]:
    """Return (out, in) of a linear layer, quantised or not."""
    weight, module = place.weight, place.module
    assert isinstance(weight, Tensor)
    if is_quantised(weight) or weight.dim() != 2:  # packed
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    out_features, in_features = weight.shape[::-1] if is_conv1d(module) else weight.shape
    return int(out_features), int(in_features)


def _described(model: nn.Module) -> str:
    """Return the class of a model, and the last part of the name that it was loaded by."""
    inner = unwrapped(model)
    base = getattr(inner, "get_base_model", None)
    inner = base() if callable(base) else inner
    name = str(getattr(getattr(inner, "config", None), "_name_or_path", "") or "")
    own = type(inner).__name__
    return f"{own} ({name.rstrip('/').rpartition('/')[2]})" if name else own
