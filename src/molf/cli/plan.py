"""`molf plan`."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.job.settings.settings import DATA, MODEL, OUTPUT, TrainSettings
from molf.planning.workload import DEVICES


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
            with --fsdp N, N GPUs share them.
        num_nodes: Machines.
        json: Print the plan as JSON, sizes in bytes.
    """
    from molf.job.ahead.plan import plan
    from molf.masking import mask

    found = plan(settings, device=device, num_gpus=num_gpus, num_nodes=num_nodes)
    if json:
        sys.stdout.write(json_module.dumps(mask(found.record()), indent=2) + "\n")
        return
    from molf.cli.plan_report import print_plan

    print_plan(found)
