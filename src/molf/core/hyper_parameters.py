"""Hyper-parameters of a parameter group as Python numbers.

A group may hold tensors, which schedulers write in place, or NumPy numbers, which schedules return.
A step uses Python numbers. A saved state has Python numbers and tensors, for
`torch.load(weights_only=True)`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

_SINGLE = ("lr", "eps", "weight_decay", "bias_weight_decay")
_EACH_EXPERT = ("lora_lr_ratios", "lora_weight_decays")


def number(name: str, value: Any, *, smallest: float = -math.inf) -> float:
    """Return a hyper-parameter as a Python number.

    Args:
        name: Name of the hyper-parameter.
        value: A number, or a tensor or NumPy array with one element. For a tensor the host waits
            for its device.
        smallest: Smallest allowed value.

    Raises:
        ValueError: The value is not a number, not finite or too small.
    """
    found = _as_number(value)
    if found is None or not math.isfinite(found) or found < smallest:
        least = f", at least {smallest:g}" if smallest > -math.inf else ""
        raise ValueError(f"Invalid {name}={_shown(value)}. Must be a finite number{least}.")
    return found


def pair_of_betas(value: Any) -> tuple[float, float]:
    """Return the decay rates of the moments as Python numbers.

    Raises:
        ValueError: They are not two numbers in [0, 1).
    """
    found = [_as_number(beta) for beta in value] if isinstance(value, (tuple, list)) else []
    if len(found) != 2 or not all(beta is not None and 0 <= beta < 1 for beta in found):
        shown = _shown(value)
        if isinstance(value, (tuple, list)):
            shown = f"({', '.join(map(_shown, value))})"
        raise ValueError(f"Invalid betas={shown}. Must be two numbers in [0, 1).")
    return found[0], found[1]  # type: ignore[return-value]


def readable(group: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter group with Python numbers as hyper-parameters, for one step.

    Rates and decays may be negative, as in torch's optimizers.

    Raises:
        ValueError: A value is not a finite number, or a beta is outside [0, 1).
    """
    # This runs for each group in each step, so the usual case is tested first.
    if _is_readable(group):
        return group
    found: dict[str, Any] = {name: number(name, group[name]) for name in _SINGLE if name in group}
    found["betas"] = pair_of_betas(group["betas"])
    for name in _EACH_EXPERT:
        if name in group:
            found[name] = tuple(number(name, value) for value in _each(name, group[name]))
    return {**group, **found}


def _is_readable(group: dict[str, Any]) -> bool:
    """Return whether all hyper-parameters are finite floats (the fast, usual case)."""
    betas = group["betas"]
    values = [group[name] for name in _SINGLE if name in group]
    for name in _EACH_EXPERT:
        each = group.get(name, ())
        if type(each) is not tuple:
            return False
        values += each
    return (
        type(betas) is tuple
        and len(betas) == 2
        and all(type(beta) is float and 0 <= beta < 1 for beta in betas)
        and all(type(value) is float and -math.inf < value < math.inf for value in values)
    )


def storable(value: Any) -> Any:
    """Return a value of a group with NumPy numbers converted to Python numbers."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(storable, value)) if type(value) in (tuple, list) else value
    if value is None or isinstance(value, (str, Tensor)) or type(value) in (bool, int, float):
        return value
    found = _as_number(value)
    return value if found is None else found


def separate(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Copy the hyper-parameter tensors that a group shares with other groups."""
    # A scheduler writes into the tensor of each group: a shared one it would multiply once per
    # group.
    for name in _SINGLE:
        value = group.get(name)
        if isinstance(value, Tensor) and any(other.get(name) is value for other in others):
            group[name] = value.detach().clone()


def _each(name: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, (tuple, list)):
        raise ValueError(f"Invalid {name}={_shown(values)}. Must be one number per rank.")
    return values


def _as_number(value: Any) -> float | None:
    """Return a Python number; None if the value is not a number or too large for a float."""
    if type(value) in (float, int):
        return _as_float(value) if type(value) is int and abs(value) >> 53 else value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta or value.is_complex():
            return None
        value = value.detach().item()
    elif getattr(value, "size", None) == 1 and hasattr(value, "item"):  # NumPy's
        value = value.item()
    # True would otherwise be a rate of 1.
    if isinstance(value, bool):
        return None
    if type(value) in (float, int):
        return value
    return _as_float(value) if isinstance(value, numbers.Real) else None


def _as_float(value: Any) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def _shown(value: Any) -> str:
    """Return a value in one line, for messages."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
