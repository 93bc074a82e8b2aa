"""Hyper-parameters of a parameter group, read as Python numbers whatever they are kept as.

A group may keep a tensor, into which schedulers write in place as with torch's optimizers, or a
number of NumPy, which schedules return. A step computes with Python numbers, and a saved state has
Python numbers and tensors, which `torch.load(weights_only=True)` reads.
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
        name: The hyper-parameter's name.
        value: A number, or a tensor or NumPy array with one element. The host waits for the device
            that a tensor is on.
        smallest: The smallest value that is allowed.

    Raises:
        ValueError: It is no such number, or not finite, or too small.
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
    """Return a parameter group whose hyper-parameters are Python numbers, for one step.

    Rates and decays may be negative, as schedules can make them and torch's optimizers take them.

    Raises:
        ValueError: One is not a finite number, or a beta is outside [0, 1).
    """
    if _is_readable(group):
        return group
    found: dict[str, Any] = {name: number(name, group[name]) for name in _SINGLE if name in group}
    found["betas"] = pair_of_betas(group["betas"])
    for name in _EACH_EXPERT:
        if name in group:
            found[name] = tuple(number(name, value) for value in _each(name, group[name]))
    return {**group, **found}


def _is_readable(group: dict[str, Any]) -> bool:
    """Return whether a group has nothing but finite floats: soon known, and nearly always so."""
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
    """Return a value of a group as a saved state has it: Python numbers in place of NumPy's."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(storable, value)) if type(value) in (tuple, list) else value
    if value is None or isinstance(value, (str, Tensor)) or type(value) in (bool, int, float):
        return value
    found = _as_number(value)
    return value if found is None else found


def separate(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Give a group tensors of its own where it shares a hyper-parameter with other groups.

    A scheduler goes from group to group and writes into the tensor of each: what they share it
    would write, or multiply, once for every group.
    """
    for name in _SINGLE:
        value = group.get(name)
        if isinstance(value, Tensor) and any(other.get(name) is value for other in others):
            group[name] = value.detach().clone()


def _each(name: str, values: Any) -> Sequence[Any]:
    if not isinstance(values, (tuple, list)):
        raise ValueError(f"Invalid {name}={_shown(values)}. Must be one number per rank.")
    return values


def _as_number(value: Any) -> float | None:
    """A Python number; None where the value is none, or too large to be one."""
    if type(value) in (float, int):
        return _as_float(value) if type(value) is int and abs(value) >> 53 else value
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_meta or value.is_complex():
            return None
        value = value.detach().item()
    elif getattr(value, "size", None) == 1 and hasattr(value, "item"):  # NumPy's
        value = value.item()
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
    """A value in one line."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
