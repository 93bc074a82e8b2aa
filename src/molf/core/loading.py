"""What a saved optimizer state must be, to be loaded; and AdamW's, made into one of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from molf.core.adam import compute_dtype
from molf.core.groups import check_group
from molf.core.layers import clean_name
from molf.core.moments import in_present_layout
from molf.core.storage import check_known_rounding, check_rounding

_STRUCTURE = ("layer", "transposed", "ranks", "scalings", "adapter_scaling")
_OWN = "state_dtype"  # a key that all groups of this package have, and no others
_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
_HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay", "initial_lr", "params", "layer")
# PEFT writes the adapter's name after one of these.
_ADAPTER = re.compile(r"\b(lora_\w+|modules_to_save|trainable_tokens_\w+)\.[^.]+")


def loadable(given: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a saved state as an optimizer with these groups can take it.

    The state of `torch.optim.AdamW` becomes ours: the counter an integer, moments in the dtype of
    the arithmetic. Names of parameters stay the optimizer's own.

    Raises:
        ValueError: The saved groups are of other layers, experts or parameters, or have a value out
            of range; or the state is another optimizer's.
    """
    saved = given["param_groups"]
    _check_same_structure(saved, groups)
    merged = [
        {**own, **one, "params": own["params"]} for one, own in zip(saved, groups, strict=True)
    ]
    for group in merged:
        check_group(group)
        check_known_rounding(group["weight_rounding"])
    for rounding in {group["weight_rounding"] for group in merged}:
        check_rounding(
            (p for g in merged if g["weight_rounding"] == rounding for p in g["params"]), rounding
        )
    state = {key: in_present_layout(one) for key, one in given["state"].items()}
    result = []
    for one, own in zip(saved, groups, strict=True):
        group = {key: value for key, value in one.items() if key != "param_names"}
        if _OWN not in one:
            _check_adamw(one, (state.get(i, {}) for i in one["params"]))
            for saved_id, parameter in zip(one["params"], own["params"], strict=True):
                if saved_id in state:
                    state[saved_id] = _converted(state[saved_id], parameter)
            group = {key: value for key, value in group.items() if key in _HYPER_PARAMETERS}
        if "param_names" in own:
            group["param_names"] = list(own["param_names"])
        result.append(group)
    return {**given, "state": state, "param_groups": result}


def _check_same_structure(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Refuse saved groups that were built for other layers, experts or parameters."""
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"Cannot load the optimizer state: it has {len(saved_groups)} parameter groups, this "
            f"optimizer has {len(groups)}."
        )
    for saved, own in zip(saved_groups, groups, strict=True):
        for key in _STRUCTURE:
            given, expected = saved.get(key), own.get(key)
            if _plain(given) != _plain(expected):
                raise ValueError(
                    f"Cannot load the optimizer state: a group has {key}={given!r} where this "
                    f"optimizer has {expected!r}."
                )
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"Cannot load the optimizer state: a group has {len(saved['params'])} parameters "
                f"where this optimizer has {len(own['params'])}."
            )
        # Parameters may be given without names.
        names = saved.get("param_names", ()), own.get("param_names", ())
        for name, expected in zip(*names, strict=False):
            if _without_adapter(name) != _without_adapter(expected):
                raise ValueError(
                    f"Cannot load the optimizer state: it is that of parameter {name!r} where this "
                    f"optimizer has {expected!r}."
                )


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _without_adapter(name: str) -> str:
    return _ADAPTER.sub(r"\1", clean_name(name))


def _check_adamw(group: dict[str, Any], states: Iterable[dict[str, Any]]) -> None:
    """Refuse a group of another optimizer whose state is not just AdamW's."""
    found = next((keys for s in states if (keys := set(s)) and keys != _ADAMW), _ADAMW)
    other = [key for key in ("amsgrad", "maximize") if group.get(key)]
    if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
        other.append("weight decay that is not decoupled")
    other += sorted(map(str, found - _ADAMW)) + [f"no {key}" for key in sorted(_ADAMW - found)]
    if other:
        raise ValueError(
            f"Cannot load the optimizer state: it is not that of a plain AdamW, it has "
            f"{', '.join(other)}. Start with a fresh state."
        )


def _converted(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """AdamW's state of one tensor as ours."""
    dtype = compute_dtype(parameter)
    return {key: int(x) if key == "step" else x.to(dtype) for key, x in state.items()}
