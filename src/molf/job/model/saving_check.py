"""Check before a training that its result can be saved: formats, types and disk space."""

from __future__ import annotations

import warnings

import torch

from molf.disk.room import check_file_size, check_room
from molf.errors import InputError
from molf.job.methods import Plan
from molf.job.model.loading import LoadedModel
from molf.job.model.low_halves import Rounding
from molf.job.model.room_needed import Needed, checkpoint_bytes, needed, run_bytes
from molf.job.model.saved_tensors import (
    Storing,
    Types,
    counterpart,
    default_dtype,
    dtype_name,
    file_state,
    is_quantised_model,
)
from molf.job.model.saving import rehearse_saving
from molf.job.model.stored import is_real
from molf.job.settings.resolved import ResolvedSettings


def storing_of(base: LoadedModel, settings: ResolvedSettings) -> Storing:
    """Return type and rounding for a model trained from `base`; `save_dtype` is the user's."""
    dtype = None if settings.save_dtype is None else getattr(torch, settings.save_dtype)
    target = dtype or default_dtype(base)
    stored = base.stored.main_dtype
    return Storing(
        dtype=dtype,
        rounding=Rounding.chosen(settings.save_rounding, settings.seed, stored, target),
        keep_low_halves=settings.keep_low_halves,
    )


def check_saving(
    base: LoadedModel, settings: ResolvedSettings, plan: Plan, steps: int, evaluated: int
) -> Needed:
    """Check that the run's files can be saved, without keeping any.

    Args:
        base: The model that will be trained.
        settings: The run's settings; `save_dtype` is the user's.
        plan: The planned method.
        steps: Optimizer steps of the run.
        evaluated: Number of evaluated records.

    Returns:
        The estimated bytes that the training will write.

    Raises:
        InputError: The model cannot be saved, a number overflows the type, or there is too little
            disk space.
    """
    storing = storing_of(base, settings)
    dtype = storing.dtype or default_dtype(base)
    if storing.keep_low_halves and dtype != torch.bfloat16:
        raise InputError(
            f"Invalid keep_low_halves: model {settings.model} is saved in {dtype_name(dtype)}, "
            "and only bfloat16 has low halves. Give --save_dtype bfloat16, or leave "
            "keep_low_halves out."
        )
    if settings.save_rounding is not None and dtype.itemsize > 2:
        warnings.warn(
            f"Without effect: save_rounding={settings.save_rounding}. The model is saved in "
            f"{dtype_name(dtype)}.",
            stacklevel=2,
        )
    beside = rehearse_saving(base, settings.model)
    model = _check_types(base, storing, settings.model) + base.unused_tensors.nbytes
    further = run_bytes(
        base.model,
        settings,
        plan,
        steps,
        beside=beside,
        stored=base.stored.main_dtype,
        evaluated=evaluated,
    )
    parts = {"model": model + beside, **further}
    lower = "Lower --save_total_limit, raise --save_steps, or" if further["checkpoints"] else ""
    check_room(
        settings.output_dir,
        parts,
        option=f"output_dir {settings.output_dir}: the run",
        advice=f"{lower or 'Make room, or'} give another --output_dir.",
    )
    check_file_size(settings.output_dir, max(model, further["adapter"]))
    return needed(parts, checkpoint_bytes(base.model, settings, plan, beside))


def _check_types(base: LoadedModel, storing: Storing, name: str) -> int:
    """Return the bytes of the model's tensors; reject numbers that overflow their type."""
    if is_quantised_model(base.model):  # its tensors are codes, but it is saved unquantised
        return int(base.model.num_parameters() * (storing.dtype or default_dtype(base)).itemsize)
    total = 0
    types = Types.of(base.model, base, storing.dtype)
    for key, tensor in file_state(base.model).items():
        stored = counterpart(base, base.model, key, tensor)
        dtype = types.of_tensor(key, tensor.dtype, stored)
        total += tensor.numel() * dtype.itemsize
        # Of the types that can be chosen, only float16 has a smaller range than the others.
        if dtype != torch.float16 or stored is None or stored.dtype == dtype:
            continue
        if not is_real(stored.dtype):
            continue
        values = base.stored.read(stored.name)
        if not torch.equal(values.isfinite(), values.to(dtype).isfinite()):
            raise InputError(
                f"model {name}: {stored.name} has numbers that do not fit "
                f"{dtype_name(dtype)}. Give --save_dtype bfloat16 or float32."
            )
    return total
