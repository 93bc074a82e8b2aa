"""Loading of saved optimizer states, those of `torch.optim.AdamW` included."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from molf.core.arithmetic.adam import compute_dtype, real_view
from molf.core.hyper_parameters import separate, storable
from molf.core.model.groups import check_group, differences, parameter_name
from molf.core.model.module_names import clean_name
from molf.core.options import check_word
from molf.core.storage.moments import (
    block_of_8bit,
    check_state_dtype,
    in_present_layout,
    moments_of,
)
from molf.core.storage.sharding import local_part
from molf.core.storage.weights import LOW, check_rounding, fold_low
from molf.core.warn import warn

Keep = Callable[[Tensor, str, Tensor], Tensor]
"""Returns a copy of a tensor for a parameter's state, by its key."""

_STRUCTURE = ("layer", "transposed", "ranks", "scalings", "adapter_scaling")
_KEY_OF_MOLF = "state_dtype"  # all groups of this package have this key; torch's have not
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ADAMW = {"step", *_MOMENTS}
_HYPER_PARAMETERS = ("lr", "betas", "eps", "weight_decay", "initial_lr", "params", "layer")
# PEFT writes the adapter's name after one of these.
_ADAPTER = re.compile(r"\b(lora_\w+|modules_to_save|trainable_tokens_\w+)\.[^.]+")


def convert_state_dict(given: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert a saved state for an optimizer with these groups.

    The counter becomes an integer; moments and factors get the dtype of the arithmetic. So states
    of `torch.optim.AdamW` and of weights of another dtype load. Parameters keep the names of this
    optimizer, and its rounding if the saved one does not fit the weights' dtype.

    Raises:
        ValueError: The saved groups have other layers, experts or parameters, or a value out of
            range; or the state is another optimizer's, has another shape, or overflows the dtype of
            the arithmetic.
        ImportError: Moments are 8-bit, and torchao is not installed.
    """
    saved_groups = [
        {key: storable(value) for key, value in saved.items()} for saved in given["param_groups"]
    ]
    _check_same_structure(saved_groups, groups)
    merged = [
        {**own, **saved, "params": own["params"]}
        for saved, own in zip(saved_groups, groups, strict=True)
    ]
    for group in merged:
        check_group(group, smallest=-math.inf)  # schedules can make rates negative
        check_word("weight_rounding", group["weight_rounding"])
        check_state_dtype(group["state_dtype"])
    state = dict(given["state"])
    result = []
    for number, (saved, own) in enumerate(zip(saved_groups, groups, strict=True)):
        group = {key: value for key, value in saved.items() if key != "param_names"}
        if _KEY_OF_MOLF not in saved:
            _check_adamw(saved, (state.get(i, {}) for i in saved["params"]))
            group = {key: value for key, value in group.items() if key in _HYPER_PARAMETERS}
        for place, saved_id in enumerate(saved["params"]):
            if saved_id in state:
                state[saved_id] = convert_state(state[saved_id], own, place, number)
        if not _fits_weights(group.get("weight_rounding"), merged):
            group["weight_rounding"] = own["weight_rounding"]
        if "param_names" in own:
            group["param_names"] = list(own["param_names"])
        result.append(group)
    return {**given, "state": state, "param_groups": result}


def load(
    optimizer: Optimizer,
    state_dict: dict[str, Any],
    load_groups: Callable[[dict[str, Any]], None],
    keep: Keep,
    check_saved_group: Callable[[dict[str, Any]], None],
) -> None:
    """Load a state into an optimizer; every tensor keeps the saved bits where dtypes allow.

    `torch.optim.Optimizer.load_state_dict` casts floating-point state to the parameter's dtype,
    which would round the float32 moments of bfloat16 weights, and moves it to the parameter's
    device, where an offloaded state may not fit. It gets the state without tensors.

    Args:
        optimizer: The optimizer.
        state_dict: The saved state.
        load_groups: torch's own `load_state_dict` of this optimizer.
        keep: Returns a copy of a tensor for a parameter's state, by its key.
        check_saved_group: Refuses a saved group that the optimizer cannot step.
    """
    loaded: dict[str, Any] = {}

    # Hooks, so that those of users run before, and see the state as it was saved.
    def capture_last(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        loaded.update(convert_state_dict(given, optimizer.param_groups))
        for group in loaded["param_groups"]:
            check_saved_group(group)
        own = {i for group in loaded["param_groups"] for i in group["params"]}
        bare = {i: without_tensors(s) if i in own else s for i, s in loaded["state"].items()}
        return {**loaded, "state": bare}

    capture = optimizer.register_load_state_dict_pre_hook(capture_last)
    restore = optimizer.register_load_state_dict_post_hook(
        lambda _: _restore_bits(optimizer, loaded, keep), prepend=True
    )
    try:
        load_groups(state_dict)
    finally:
        capture.remove()
        restore.remove()


def _restore_bits(optimizer: Optimizer, loaded: dict[str, Any], keep: Keep) -> None:
    """Copy the tensors of a loaded state, and add lower halves to weights that can hold them."""
    groups = optimizer.param_groups
    for number, group in enumerate(groups):
        separate(group, groups[:number])
    saved_ids = [i for group in loaded["param_groups"] for i in group["params"]]
    names = {
        p: parameter_name(group, place, number)
        for number, group in enumerate(groups)
        for place, p in enumerate(group["params"])
    }
    parameters = [p for group in groups for p in group["params"]]
    lost = []
    for saved_id, parameter in zip(saved_ids, parameters, strict=True):
        if not restore_tensors(optimizer.state, parameter, loaded["state"].get(saved_id, {}), keep):
            lost.append(names[parameter])
    if lost:
        warn(
            f"The lower halves of {len(lost)} bfloat16 weights of the saved state are not used "
            f"(first: {lost[0]}): the weights here are not those that they belong to. Load the "
            "model before the optimizer."
        )


def restore_tensors(
    states: Any,
    parameter: Tensor,
    values: dict[str, Any],
    keep: Keep,
) -> bool:
    """Copy the tensors of a parameter's state; add lower halves to a weight that can hold them.

    Returns:
        Whether all are used; lower halves are not, if the parameter has other values.
    """
    for key, value in values.items():
        if isinstance(value, Tensor):
            # A copy, also on the same device: two optimizers never share state.
            states[parameter][key] = keep(parameter, key, value)
        elif value == {}:
            # What flattened distributed checkpoints load where nothing was saved.
            del states[parameter][key]
    if LOW not in states.get(parameter, {}) or parameter.dtype == torch.bfloat16:
        return True
    low = states[parameter].pop(LOW)
    return fold_low(local_part(parameter), local_part(low).to(local_part(parameter).device))


def without_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Return a parameter's state without its tensors."""
    return {key: value for key, value in state.items() if not isinstance(value, Tensor)}


def _fits_weights(rounding: str | None, groups: list[dict[str, Any]]) -> bool:
    """Return whether a rounding fits the weights of all groups that have it."""
    parameters = (p for g in groups if g["weight_rounding"] == rounding for p in g["params"])
    try:
        check_rounding(parameters, rounding)
    except ValueError:
        return False
    return True


def _check_same_structure(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Refuse saved groups of other layers, experts or parameters."""
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
        # Not strict: parameters may have no names.
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
    """Refuse a group of another optimizer than plain AdamW."""
    found = next((keys for s in states if (keys := set(s)) and keys != _ADAMW), _ADAMW)
    other = differences(group) + sorted(map(str, found - _ADAMW))
    other += [f"no {key}" for key in sorted(_ADAMW - found)]
    if other:
        raise ValueError(
            f"Cannot load the optimizer state: it is not that of a plain AdamW, it has "
            f"{', '.join(other)}. Start with a fresh state."
        )


def has_step_dtypes(parameter: Tensor, state: dict[str, Any]) -> bool:
    """Return whether a state has the dtypes of a parameter's steps."""
    # `module.double()` changes a parameter's dtype between steps.
    if LOW in state and parameter.dtype != torch.bfloat16:
        return False
    dtype = compute_dtype(parameter)
    if "exp_avg_codes" in state:
        return dtype == torch.float32
    return "exp_avg" not in state or state["exp_avg"].dtype == dtype


def convert_state(
    state: dict[str, Any], group: dict[str, Any], place: int, number: int
) -> dict[str, Any]:
    """Return one parameter's state in the dtype of the arithmetic; low halves stay int16.

    Args:
        state: Saved state, or the state before the parameter's dtype changed.
        group: Parameter group.
        place: Position of the parameter in the group.
        number: Number of the group.

    Raises:
        ValueError: The state belongs to another shape, lacks a tensor, or overflows.
    """
    parameter: Tensor = group["params"][place]
    name = parameter_name(group, place, number)
    shapes = _shapes(parameter, group)
    result = {
        key: real_view(value) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    for key, value in result.items():
        shape = shapes.get(key.removesuffix("_codes"))
        if isinstance(value, Tensor) and shape is not None and value.shape != shape:
            raise ValueError(
                f"Cannot load the optimizer state: {key} of {name} has shape {tuple(value.shape)}, "
                f"and here it has {tuple(shape)}."
            )
    result = in_present_layout(result)
    if "exp_avg_codes" in result and block_of_8bit(parameter) is None:
        result = _without_codes(result)
    lacking = sorted(_needed(result, shapes) - result.keys())
    if lacking:
        raise ValueError(
            f"Cannot load the optimizer state: that of {name} lacks {', '.join(lacking)}."
        )
    dtype = compute_dtype(parameter)
    for key, value in result.items():
        if key == "step" and value != {}:  # {}: a flattened checkpoint without this state
            result[key] = int(value)
        elif key in shapes and key != LOW and isinstance(value, Tensor):
            result[key] = value.to(dtype)
            if value.dtype.itemsize > dtype.itemsize and _overflows(value, result[key]):
                raise ValueError(
                    f"Cannot use the optimizer state: {key} of {name} is too large for {dtype}. "
                    f"Load the model in {value.dtype}, or start with a fresh state."
                )
    return result


def _shapes(parameter: Tensor, group: dict[str, Any]) -> dict[str, torch.Size]:
    """Return the shapes of the tensors that a parameter's state may have."""
    shape = real_view(parameter).shape
    shapes = dict.fromkeys((*_MOMENTS, LOW), shape)
    is_folded = group["layer"] is not None and group.get("adapter_scaling") is None
    if is_folded and len(shape) == 2:
        out_features, in_features = reversed(shape) if group["transposed"] else shape
        rank = sum(group["ranks"])
        for key in ("", *(f"_{moment}" for moment in _MOMENTS)):
            shapes[f"lora_A{key}"] = torch.Size((rank, in_features))
            shapes[f"lora_B{key}"] = torch.Size((out_features, rank))
    return shapes


def _needed(state: dict[str, Any], shapes: Iterable[str]) -> set[str]:
    """Return the keys of the tensors that a step reads of this state; none before the first."""
    if state.get("step", {}) == {}:  # {}: a flattened checkpoint without this state
        return set()
    keys = {*shapes} - {LOW}
    if "exp_avg_codes" in state:
        kinds = ("codes", "scales")
        keys |= {f"{moment}_{kind}" for moment in _MOMENTS for kind in kinds}
        keys -= {*_MOMENTS}
    return keys


def _without_codes(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with dequantised moments."""
    rest = {key: x for key, x in state.items() if not key.endswith(("_codes", "_scales"))}
    rows = slice(0, len(state["exp_avg_codes"]))
    return {**rest, **dict(zip(_MOMENTS, moments_of(state).load(rows), strict=True))}


def _overflows(before: Tensor, after: Tensor) -> bool:
    return bool((before.isfinite() & ~after.isfinite()).any())
