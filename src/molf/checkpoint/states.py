"""Model and optimizer as named tensors and plain values, and back.

Tensors share memory with the training. Loading writes into them, so that no second copy exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from molf.checkpoint.manifest import DamagedError
from molf.checkpoint.tensors import read_tensors, stored_tensors
from molf.core.schedule.unit_optimizer import UnitOptimizer

MODEL = "model."
OPTIMIZER = "optimizer."


class TrainingState(NamedTuple):
    """The state of a model and its optimizer.

    Attributes:
        tensors: `model.NAME` of buffers and of parameters that are trained, or that have a state of
            the optimizer; `optimizer.NAME.KEY` of a parameter's state. They share memory with the
            training.
        values: Groups of the optimizer, and the values of its states that are no tensors; loads
            with `weights_only=True`.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def training_state(model: nn.Module, optimizer: Optimizer) -> TrainingState:
    """Return the state of a model and its optimizer, between two steps.

    Raises:
        ValueError: A parameter of the optimizer is not in the model.
    """
    tensors = dict(_model_tensors(model, optimizer.state))
    values: dict[str, dict[str, Any]] = {}
    packed = optimizer.state_dict()
    names = _names(model, optimizer)
    for index, state in packed["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{names[index]}.{key}"] = value
            else:
                values.setdefault(names[index], {})[key] = value
    groups = [
        {**group, "params": [names[index] for index in group["params"]]}
        for group in packed["param_groups"]
    ]
    own: dict[str, Any] = {"groups": groups, "values": values}
    if isinstance(optimizer, UnitOptimizer):
        own["skipped_steps"] = optimizer.skipped_steps
    return TrainingState(tensors, own)


def load_training_state(
    checkpoint: Path, values: dict[str, Any], model: nn.Module, optimizer: Optimizer
) -> None:
    """Load a state into a model and its optimizer, in place.

    Args:
        checkpoint: A checkpoint whose hashes were checked.
        values: `TrainingState.values` of it.
        model: The model, with the same trained parameters; those that were frozen during the
            training are frozen after loading.
        optimizer: The optimizer of the model; its state is replaced.

    Raises:
        DamagedError: The checkpoint has other parameters or shapes.
        ValueError: The groups are those of another optimizer.
    """
    names = _names(model, optimizer)
    numbers = {name: index for index, name in enumerate(names)}
    saved = [name for group in values["groups"] for name in group["params"]]
    if saved != names:
        raise DamagedError("it is that of a model or optimizer with other parameters")
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in values["groups"]
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    parameters = dict(zip(names, _parameters(optimizer), strict=True))
    # Longest first: a name may begin with another one.
    targets = dict(_model_tensors(model))
    stored = stored_tensors(checkpoint)
    for name, (shape, dtype) in stored.items():
        if not name.startswith(OPTIMIZER):
            continue
        owner, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        parameter = parameters[owner]
        room = _room(optimizer, parameter, key, shape, dtype)
        optimizer.state[parameter][key] = targets[name] = room
    missing = targets.keys() ^ stored.keys()
    if missing:
        first = min(missing)
        frozen = " is frozen in the model" if first.removeprefix(MODEL) in names else ""
        raise DamagedError(f"it and the model differ in {len(missing)} tensors: {first}{frozen}")
    read_tensors(checkpoint, targets)
    for owner, state in values["values"].items():
        optimizer.state[parameters[owner]].update(state)
    if isinstance(optimizer, UnitOptimizer):
        optimizer.skipped_steps = values["skipped_steps"]


def _room(
    optimizer: Optimizer, parameter: Tensor, key: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Return an uninitialised tensor in the memory where the optimizer keeps this state."""
    if isinstance(optimizer, UnitOptimizer):
        return optimizer.room(parameter, key, shape, dtype)
    if key == "step":  # as torch's optimizers: on the CPU, unless a kernel of the device reads it
        group = next(
            group
            for group in optimizer.param_groups
            if any(parameter is one for one in group["params"])
        )
        if not (group.get("fused") or group.get("capturable")):
            return torch.empty(shape, dtype=dtype)
    if shape == parameter.shape:  # with its strides
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device)


def _model_tensors(
    model: nn.Module, states: Mapping[Tensor, Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a training changes: trained parameters, and saved buffers.

    Args:
        model: The model.
        states: States of the optimizer; a frozen parameter that has one was trained before.
    """
    states = {} if states is None else states
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or states.get(parameter):
            yield f"{MODEL}{name}", parameter.detach()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield f"{MODEL}{name}", buffer


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of an optimizer's parameters in the order of its groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        return [names[id(parameter)] for parameter in _parameters(optimizer)]
    except KeyError as error:
        raise ValueError("The optimizer has a parameter that is not in the model.") from error


@torch.no_grad()
def frozen_checksums(model: nn.Module) -> dict[str, int]:
    """Return a checksum of the bits of each parameter that is not trained, by name.

    Checkpoints leave these parameters out; the checksums show that they are still the same.
    """
    sums = {
        name: _sum_of_bits(parameter)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    if not sums:
        return {}
    # One host read per device.
    by_device: dict[torch.device, list[str]] = {}
    for name, total in sums.items():
        by_device.setdefault(total.device, []).append(name)
    found = {
        name: int(total)
        for names in by_device.values()
        for name, total in zip(names, torch.stack([sums[x] for x in names]).tolist(), strict=True)
    }
    return {name: found[name] for name in sums}


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as integers, int64, 0-dim; it wraps around."""
    if hasattr(tensor, "__tensor_flatten__"):  # quantised weights made of several tensors
        names, _ = tensor.__tensor_flatten__()
        return torch.stack([_sum_of_bits(getattr(tensor, name)) for name in names]).sum()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()
    size = tensor.dtype.itemsize
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.view(integers).sum(dtype=torch.int64)
