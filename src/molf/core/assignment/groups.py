"""Parameter groups of an assigned model: weights and the rest, and LoRA factors at their own rate.

All groups are plain AdamW groups.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from molf.core.assignment.assignment import Assignment
from molf.core.assignment.layout import Layout
from molf.core.hyper_parameters import number
from molf.core.model.adapted_layers import adapter_layers
from molf.core.model.groups import NamedParameters, plain_groups, warn_of_saving
from molf.core.model.linear_places import linear_places
from molf.core.model.module_names import cleaner
from molf.core.model.weight_checks import check_has_values

_ADAPTERS = ("lora_A", "lora_B", "lora_magnitude_vector")


def assignment_groups(
    model: nn.Module,
    assignment: Assignment,
    *,
    lr: float | Tensor,
    lora_lr: float | Tensor | None,
    weight_decay: float,
    lora_weight_decay: float,
) -> list[dict[str, Any]]:
    """Return the groups; the arguments are those of `molf.AdamW.from_assignment`.

    Up to four, in this order: weights and other matrices; biases, norms and other vectors, without
    decay; LoRA factors; magnitudes of DoRA, without decay.

    Raises:
        TypeError: `assignment` is no `Assignment`.
        ValueError: The model has not been prepared by `with_assignment`, a rate or decay is out of
            range, or nothing is trained.
    """
    Assignment.expect(assignment)
    for name, value in (
        ("lr", lr),
        ("lora_lr", lr if lora_lr is None else lora_lr),
        ("weight_decay", weight_decay),
        ("lora_weight_decay", lora_weight_decay),
    ):
        number(name, value, smallest=0)
    _check_prepared(model, assignment)
    clean = cleaner(model)
    tuners = tuple(f"{name}." for name in adapter_layers(model))
    dense: NamedParameters = []
    factors: NamedParameters = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            check_has_values(name, parameter)
            is_factor = name.startswith(tuners) and any(f".{x}." in name for x in _ADAPTERS)
            (factors if is_factor else dense).append((clean(name), parameter))
    # Moments of factors are float32, as in a routed layer.
    lora = {"lr": lr if lora_lr is None else lora_lr, "state_dtype": "float32"}
    groups: list[dict[str, Any]] = [
        *plain_groups(model, dense, weight_decay),
        {
            "params": [x for x in factors if x[1].dim() >= 2],
            "weight_decay": lora_weight_decay,
            **lora,
        },
        {"params": [x for x in factors if x[1].dim() < 2], "weight_decay": 0.0, **lora},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("No parameter of the model is trained. Make a layer full or lora.")
    if factors:
        warn_of_saving(model, [name for name, _ in dense])
    return groups


def _check_prepared(model: nn.Module, assignment: Assignment) -> None:
    """Refuse a model that `with_assignment` has not prepared with this assignment.

    Raises:
        ValueError: With the first difference.
    """
    assignment.check(Layout.of(model))
    clean = cleaner(model)
    tuners = {clean(name): module for name, module in adapter_layers(model).items()}
    places = {place.name.removesuffix(".base_layer"): place for place in linear_places(model)}
    remedy = "Call molf.with_assignment(model, assignment) first, on the plain model."
    for layer in assignment.entries:
        own, weight = f"Layer {layer.name} is {layer.train}", places[layer.name].weight
        tuner: Any = tuners.pop(layer.name, None)
        if (tuner is not None) != (layer.train == "lora"):
            raise ValueError(f"{own} and has {'no' if tuner is None else 'an'} adapter. {remedy}")
        if tuner is not None and layer.r not in tuner.r.values():
            ranks = ", ".join(map(str, tuner.r.values()))
            raise ValueError(f"{own} with r={layer.r}, and its adapter has rank {ranks}. {remedy}")
        if tuner is not None and layer.alpha not in tuner.lora_alpha.values():
            alphas = ", ".join(f"{alpha:g}" for alpha in tuner.lora_alpha.values())
            raise ValueError(
                f"{own} with alpha={layer.alpha:g}, and its adapter has alpha {alphas}. {remedy}"
            )
        is_trained = isinstance(weight, nn.Parameter) and weight.requires_grad
        if is_trained != (layer.train == "full"):
            state = "trainable" if is_trained else "frozen"
            raise ValueError(f"{own} and its weight is {state} (requires_grad). {remedy}")
    if tuners:
        raise ValueError(f"{next(iter(tuners))} has an adapter and no entry. {remedy}")
