"""The plan of a training, from its options and the model's configuration alone."""

from __future__ import annotations

import warnings
from datetime import datetime
from typing import TYPE_CHECKING

from molf.errors import InputError
from molf.job.settings.resolved import resolve
from molf.job.settings.settings import TrainSettings
from molf.job.settings.sharding import check_offload, shards
from molf.job.settings.training_arguments import check_training_args
from molf.masking import learn
from molf.planning.workload import why_not_planned

if TYPE_CHECKING:
    from molf.planning.request import TrainingPlan

_MOST = 1_000_000


def plan(
    settings: TrainSettings, *, device: str = "cuda", num_gpus: int = 1, num_nodes: int = 1
) -> TrainingPlan:
    """Plan a training without loading its weights or data.

    Args:
        settings: The options of the training.
        device: Kind of device, `cuda` or `cpu`.
        num_gpus: GPUs of each machine.
        num_nodes: Machines.

    Raises:
        InputError: The options are wrong, the model is missing, or it cannot be planned.

    Warns:
        UserWarning: Options have no effect on the plan.
    """
    # The model may be an address with a token, which the plan repeats.
    learn(vars(settings))
    shared_by = _checked_shards(settings, device, num_gpus, num_nodes)
    # Before the model is looked up, which may need the network.
    if reason := why_not_planned(settings.method, settings.kernels):
        raise InputError(reason)
    from molf.job.model.path import check_model
    from molf.job.record.assignment_source import read_assignment_source

    if settings.model is not None:
        check_model(settings.model)
    resolved = resolve(settings, datetime.now().astimezone())
    if resolved.assignment is not None:
        read_assignment_source(resolved.assignment)
    from molf.job.libraries import quiet_libraries

    with quiet_libraries():
        from molf.job.methods import assigned
        from molf.job.model.config import read_config
        from molf.job.settings.planned import (
            configs_with_frozen_base,
            planned_attention,
            planned_quantisation,
            warn_of_unplanned,
            workload_of,
        )
        from molf.measure.inference import position_limit
        from molf.planning.request import plan_training
        from molf.planning.saving import Saving
        from molf.planning.trainable import skeleton

        warn_of_unplanned(settings)
        model = read_config(resolved.model)
        planned_attention(model, settings)
        resolved = assigned(resolved, skeleton(model))
        workload = workload_of(
            resolved,
            length=min(resolved.max_length, position_limit(model) or resolved.max_length),
            padded=resolved.per_device_train_batch_size > 1,
            device=device,
            quantised=planned_quantisation(model, resolved),
            num_gpus=num_gpus,
            num_nodes=num_nodes,
            shards=0 if settings.fsdp is None else shared_by,
        )
        return plan_training(
            settings.model or resolved.model,
            model,
            workload,
            configs_with_frozen_base(settings),
            saving=Saving(resolved.most_checkpoints, resolved.async_save)
            if resolved.has_checkpoints
            else None,
        )


def _checked_shards(settings: TrainSettings, device: str, num_gpus: int, num_nodes: int) -> int:
    """Check the machines and the options that depend on them; return the shards of a weight."""
    for name, count in (("num_gpus", num_gpus), ("num_nodes", num_nodes)):
        if not 0 < count < _MOST:
            raise InputError(f"Invalid {name}={count}. Must be at least 1 and below {_MOST}.")
    check_training_args(settings.training_args)
    gpus = num_gpus * num_nodes
    if gpus == 1 and settings.fsdp is not None:
        warnings.warn(
            f"Without effect with one GPU: fsdp={settings.fsdp}. Give --num_gpus N.",
            stacklevel=3,
        )
    if settings.fsdp_cpu_offload:
        check_offload(device)
    return shards(settings.fsdp, gpus) if gpus > 1 else 1
