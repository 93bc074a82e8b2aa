"""Default weight decay of parameters that are not routed: matrices and tables decay."""

from __future__ import annotations

import re

import torch
from torch import nn

from molf.core.model.linear_places import linear_places

# Logarithms and rates of state-space layers: A_log, A_logs, A_b_log, log_dt, dt_bias, time_decay.
# Decay would not shrink them: a logarithm of 0 is a rate of 1.
_RATES = re.compile(r"(^|_)logs?(_|$)|(^|_)decay$|^D$|^Ds$")


def is_vector(key: str, parameter: torch.Tensor) -> bool:
    """Return whether a parameter is a bias, a rate or a vector, by name and shape.

    Args:
        key: Attribute name, without the module's name.
        parameter: The parameter.
    """
    # The biases of fused experts are [experts, out].
    is_named = key.endswith("bias") or _RATES.search(key) is not None
    return is_named or sum(side > 1 for side in parameter.shape) < 2


def undecayed(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a model that have no weight decay by default.

    They are biases, norms and vectors (sides of 1 do not count: a magnitude of weight_norm, a class
    token); logarithms and rates of state-space layers (`A_log`); parameters with `_no_weight_decay`
    (Mamba); and the names that a method `no_weight_decay` returns (timm).
    """
    linear = {place.weight for place in linear_places(model)}
    found = set(_named_by_model(model))
    for module in model.modules():
        # By class name: models define norms of their own. A block with children is no norm.
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, nn.UninitializedParameter):
                continue
            is_marked = is_norm or getattr(parameter, "_no_weight_decay", False)
            if is_marked or (is_vector(key, parameter) and parameter not in linear):
                found.add(parameter)
    return found


def _named_by_model(model: nn.Module) -> list[nn.Parameter]:
    found = []
    for module in model.modules():
        names = getattr(module, "no_weight_decay", None)
        if not callable(names):
            continue
        own = dict(module.named_parameters())
        try:
            found += [own[name] for name in names() if name in own]
        except TypeError:  # another method of this name, with arguments
            continue
    return found
