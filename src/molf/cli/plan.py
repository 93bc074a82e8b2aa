"""`molf plan`."""

from __future__ import annotations

import json as json_module
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.errors import InputError
from molf.job.settings.settings import DATA, MODEL, OUTPUT, TrainSettings
from molf.job.settings.sharding import shards
from molf.masking import learn, mask
from molf.planning.workload import DEVICES, why_not_planned

_MOST = 1_000_000


def plan_model(
    settings: TrainSettings = TrainSettings(),  # noqa: B008 (frozen)
    *,
    config: Annotated[Path | None, Parameter(group=DATA)] = None,
    device: Annotated[str, Parameter(choices=DEVICES, group=MODEL)] = "cuda",
    num_gpus: Annotated[int, Parameter(group=MODEL)] = 1,
    num_nodes: Annotated[int, Parameter(group=MODEL)] = 1,
    json: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False,
) -> None:
    """Print the parameters and memory of a training, from the model's configuration alone.

    Args:
        settings: The options of `molf train`; those that change no memory have no effect.
        config: A YAML file of these options, or a recipe by name; the command line has precedence.
        device: Kind of device of the training.
        num_gpus: GPUs of each machine. All share weights, gradients and optimizer state (FSDP2);
            with --fsdp N, each N of them.
        num_nodes: Machines.
        json: Print the plan as JSON, sizes in bytes.
    """
    from molf.job.model.path import check_model
    from molf.job.record.assignment_source import read_assignment_source
    from molf.job.settings.resolved import resolve

    for name, count in (("num_gpus", num_gpus), ("num_nodes", num_nodes)):
        if not 0 < count < _MOST:
            raise InputError(f"Invalid {name}={count}. Must be at least 1 and below {_MOST}.")
    # The model may be an address with a token, which the plan repeats.
    learn(vars(settings))
    gpus = num_gpus * num_nodes
    shared_by = shards(settings.fsdp, gpus) if gpus > 1 else 1
    # Before the model is looked up, which may need the network.
    if reason := why_not_planned(settings.method, settings.kernels):
        raise InputError(reason)
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
            planned_quantisation,
            workload_of,
        )
        from molf.measure.inference import position_limit
        from molf.planning.request import plan_training
        from molf.planning.saving import Saving
        from molf.planning.trainable import skeleton

        model = read_config(resolved.model)
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
        plan = plan_training(
            settings.model or resolved.model,
            model,
            workload,
            configs_with_frozen_base(settings),
            saving=Saving(resolved.most_checkpoints, resolved.async_save)
            if resolved.has_checkpoints
            else None,
        )
    if json:
        sys.stdout.write(json_module.dumps(mask(plan.record()), indent=2) + "\n")
        return
    from molf.cli.plan_report import print_plan

    print_plan(plan)
