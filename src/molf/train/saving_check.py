"""What can only fail when a training is over, tried before it begins: saving, and room for it."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from molf.errors import InputError
from molf.train.defaults import ADAPTERS
from molf.train.low_halves import Rounding
from molf.train.methods import Plan
from molf.train.methods.base import config_of
from molf.train.model_loading import LoadedModel
from molf.train.model_saving import rehearse_saving
from molf.train.resolved import ResolvedSettings
from molf.train.saved_tensors import (
    Storing,
    Types,
    counterpart,
    default_dtype,
    file_state,
    is_quantised_model,
)
from molf.train.stored import is_real

_MOMENTS = {"float32": 8.0, "8bit": 2.04}  # bytes for two of them


def storing_of(base: LoadedModel, settings: ResolvedSettings) -> Storing:
    """How a model that is trained from `base` is stored; `save_dtype` as the user gave it."""
    dtype = None if settings.save_dtype is None else getattr(torch, settings.save_dtype)
    target = dtype or default_dtype(base)
    stored = base.stored.main_dtype
    return Storing(
        dtype=dtype,
        rounding=Rounding.chosen(settings.save_rounding, settings.seed, stored, target),
        keep_low_halves=settings.keep_low_halves,
    )


def check_saving(base: LoadedModel, settings: ResolvedSettings, plan: Plan, steps: int) -> None:
    """Make sure that what the run will leave can be saved, without leaving anything.

    Args:
        base: The model that will be trained.
        settings: The run's settings; `save_dtype` as the user gave it.
        plan: What will be trained.
        steps: Optimizer steps of the run.

    Raises:
        InputError: It cannot be saved, its numbers do not fit the type, or the disk is too small.
    """
    storing = storing_of(base, settings)
    dtype = storing.dtype or default_dtype(base)
    if storing.keep_low_halves and dtype != torch.bfloat16:
        raise InputError(
            f"Invalid keep_low_halves: model {settings.model} is saved in {_name(dtype)}, of which "
            "nothing is rounded off. Give --save_dtype bfloat16, or leave keep_low_halves out."
        )
    beside = rehearse_saving(base, settings.model)
    model_bytes = _check_types(base, storing, settings.model)
    _check_room(base, settings, plan, steps, model_bytes + beside)


def _check_types(base: LoadedModel, storing: Storing, name: str) -> int:
    """Return how many bytes the model's tensors will take; refuse numbers that do not fit."""
    if is_quantised_model(base.model):  # its tensors are codes, and real ones when it is saved
        return int(base.model.num_parameters() * (storing.dtype or default_dtype(base)).itemsize)
    total = 0
    types = Types.of(base.model, base, storing.dtype)
    for key, tensor in file_state(base.model).items():
        found = counterpart(base, base.model, key, tensor)
        stored = base.stored.tensors[found] if found is not None else None
        dtype = types.of_tensor(key, tensor.dtype, stored)
        total += tensor.numel() * dtype.itemsize
        if stored is None or found is None or dtype != torch.float16 or dtype == stored.dtype:
            continue
        if stored.dtype is None or not is_real(stored.dtype):
            continue
        values = base.stored.read(found)
        if not torch.equal(values.isfinite(), values.to(dtype).isfinite()):
            raise InputError(
                f"model {name}: {found} has numbers that do not fit {_name(dtype)}. Give "
                "--save_dtype bfloat16 or float32."
            )
    return total


def _check_room(
    base: LoadedModel, settings: ResolvedSettings, plan: Plan, steps: int, model: int
) -> None:
    """Refuse a run whose files do not fit the disk."""
    needed = {"model": model, **run_bytes(base.model, settings, plan, steps)}
    place = settings.output_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    total = sum(needed.values())
    if total > free:
        parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in needed.items() if size)
        hint = " Lower --save_total_limit, raise --save_steps, or" if needed["checkpoints"] else ""
        raise InputError(
            f"output_dir {settings.output_dir}: the run needs about {_megabytes(total)} there "
            f"({parts}), and {_megabytes(free)} are free.{hint or ' Make room, or'} give another "
            "--output_dir."
        )


def run_bytes(model: Any, settings: ResolvedSettings, plan: Plan, steps: int) -> dict[str, int]:
    """Estimate the bytes of what a run leaves beside `model/`.

    Args:
        model: The base model.
        settings: The run's settings.
        plan: What will be trained.
        steps: Optimizer steps of the run.

    Returns:
        Bytes of the adapter, the lower halves and the checkpoints, those kept at the same time.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    factors = _factors(settings, plan)
    dense = plan.trained_parameters - factors
    half = settings.dtype == "bfloat16"
    exact = 2 if half and settings.weight_rounding == "exact" else 0
    adapts = dense == 0  # an adapter is all that is trained
    adapter = 4 * factors if adapts else 0
    low = 0
    if settings.keep_low_halves:
        low = 2 * (sum(x.in_features * x.out_features for x in plan.layers) if adapts else weights)
    checkpoints = 0
    if settings.save_steps is not None:
        one = adapter + 8 * factors + dense * (_MOMENTS[settings.state_dtype] + exact)
        if not adapts:
            one += weights * (2 if half else 4) + (8 if settings.is_explicit else 4) * factors
        written = -(-steps // settings.save_steps)
        kept = min(written, (settings.save_total_limit or written) + 1)  # the oldest goes last
        checkpoints = int(one * kept)
    return {"adapter": adapter, "lower halves": low, "checkpoints": checkpoints}


def _factors(settings: ResolvedSettings, plan: Plan) -> int:
    """Numbers in LoRA factors."""
    if settings.method == "fft":
        return 0
    if settings.method in ADAPTERS:
        return plan.trained_parameters
    return sum(
        layer.lora_parameters(rank) for layer in plan.layers for rank in config_of(settings).ranks
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
