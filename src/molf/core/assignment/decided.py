"""The decisions that an optimizer has taken so far, with the layers of its model."""

from __future__ import annotations

from typing import Any

from molf.core.assignment.assigned import Decided, adapters_of
from molf.core.assignment.layout import Layout
from molf.core.config import lora_expert_names
from molf.core.model.linear_places import linear_places
from molf.core.model.module_names import cleaner


def decided_by(optimizer: Any) -> Decided:
    """Return the decisions of a `MoLFAdamW`.

    If its model was deleted, the routed layers are all that is known of it.

    Raises:
        TypeError: The optimizer is no `MoLFAdamW`.
    """
    if not hasattr(optimizer, "evidence"):
        raise TypeError(
            f"Invalid optimizer of type {type(optimizer).__name__}. Must be molf.MoLFAdamW."
        )
    groups = [group for group in optimizer.param_groups if group["layer"] is not None]
    ranks = groups[0]["ranks"]
    known: dict[str, Any] = {
        "evidence": optimizer.evidence,
        "adapters": adapters_of(lora_expert_names(ranks), ranks, groups[0]["scalings"]),
        "source": f"a routed training (score {groups[0]['score']})",
    }
    model = optimizer.model
    if model is None:
        shapes = {group["layer"]: _shape(group) for group in groups}
        freezes = len(groups) == len(optimizer.param_groups)
        return Decided(layers=shapes, heads={}, freeze_rest=freezes, **known)
    layout, clean = Layout.of(model), cleaner(model)
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    trained = {
        clean(name).replace(".base_layer.", ".")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter in owned
    }
    in_full = {
        place.name.removesuffix(".base_layer")
        for place in linear_places(model)
        if place.weight in owned
    }
    heads = {f"{name}.weight" for name in known["evidence"]}  # weights of layers, if routed
    rest = [name for name in layout.rest if name not in heads]
    frozen = tuple(name for name in rest if name not in trained)
    freezes = len(frozen) == len(rest)
    return Decided(
        layers=layout.layers,
        heads=layout.heads,
        trained=frozenset(in_full & layout.layers.keys() - known["evidence"].keys()),
        freeze_rest=freezes,
        frozen_rest=() if freezes else frozen,
        model=layout.model,
        **known,
    )


def _shape(group: dict[str, Any]) -> tuple[int, int]:
    """Return (out, in) of a routed group's layer."""
    if group.get("adapter_scaling") is not None:
        lora_A, lora_B = group["params"][-2:]
        return lora_B.shape[0], lora_A.shape[1]
    out_features, in_features = group["params"][0].shape[:: -1 if group["transposed"] else 1]
    return out_features, in_features
