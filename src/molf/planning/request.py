"""The plan of a training: parameters, memory, and changes that make it fit a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from molf.core.config import MoLFConfig
from molf.errors import InputError
from molf.planning.advice import MOST_GPUS, Suggestion, suggestions
from molf.planning.devices import DEVICES, Device, show_bytes
from molf.planning.memory import MemoryPlan, Planner
from molf.planning.model_shape import ModelShape
from molf.planning.saving import Saving, SavingPlan, checkpoint_bytes
from molf.planning.workload import Workload

_NOT_PLAIN = ("config", "unreached", "assignment")  # fields of a workload
_FACTOR_BYTES = 12  # of a float32 and its two moments


@dataclass(frozen=True)
class TrainingPlan:
    """The parameters and memory of a training.

    Attributes:
        model: The model's name or path.
        workload: The planned training.
        shape: Its parameters.
        memory: Its memory on each device, with the requested checkpointing.
        without_checkpointing: The same with all activations kept.
        with_checkpointing: The same with activations recomputed.
        advice: For each size of GPU that is too small, changes with which it suffices.
        saving: Its checkpoints; None without any.
    """

    model: str
    workload: Workload
    shape: ModelShape
    memory: MemoryPlan
    without_checkpointing: MemoryPlan
    with_checkpointing: MemoryPlan
    advice: dict[Device, list[Suggestion]]
    saving: SavingPlan | None = None

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values; sizes are bytes."""
        shape, workload = self.shape, self.workload
        return {
            "model": self.model,
            "model_type": shape.model_type,
            "planned": {k: v for k, v in vars(workload).items() if k not in _NOT_PLAIN}
            | {"ranks": list(workload.config.ranks) if workload.config else []}
            | ({"assignment": str(workload.assignment)} if workload.assignment else {}),
            "parameters": {
                "total": shape.parameters,
                "trained": shape.trained,
                "experts": shape.experts,
                "adapted_layers": shape.layers,
                "head_is_tied": shape.tied,
                "parts": {
                    part.name: {"total": part.parameters, "trained": part.trained}
                    for part in shape.parts
                },
            },
            "bytes": self.memory.record(),
            "bytes_without_checkpointing": self.without_checkpointing.record(),
            "bytes_with_checkpointing": self.with_checkpointing.record(),
            "checkpoints": self.saving.record() if self.saving else None,
            "devices": [
                {
                    "name": device.name,
                    "usable_bytes": device.usable,
                    "fits": device.fits(self.memory.peak),
                    "would_fit": [
                        {"changes": list(found.changes), "peak": found.peak}
                        for found in self.advice.get(device, ())
                    ],
                }
                for device in DEVICES
            ],
        }


def plan_training(
    model: str,
    config: Any,
    workload: Workload,
    frozen_base: Mapping[str, MoLFConfig],
    devices: Iterable[Device] = DEVICES,
    saving: Saving | None = None,
) -> TrainingPlan:
    """Plan a training from the model's configuration alone.

    Args:
        model: The model's name, for the record.
        config: Its transformers configuration.
        workload: The training to plan.
        frozen_base: Methods that freeze the base, to be suggested, each with its adapter.
        devices: Sizes of GPU to give advice for.
        saving: How checkpoints are saved; None for none.

    Raises:
        InputError: The model cannot be made, or not be planned without data; or no layer can be
            adapted.
    """
    planner = Planner(config)
    shape = planner.shape(workload)
    _check_factors(shape, workload)
    try:
        memory = planner.memory(workload)
    except RuntimeError as error:  # torch counts the bytes of a tensor in 63 bits
        if "overflow" not in str(error).lower():
            raise
        raise InputError(
            f"Invalid max_length={workload.length} with {workload.batch_size} examples in a batch: "
            "a tensor would have 2**63 bytes or more."
        ) from error
    kept, recomputed = (
        planner.memory(replace(workload, checkpointing=value)) for value in (False, True)
    )
    advice = {
        device: suggestions(planner, workload, device, frozen_base)
        for device in devices
        if not device.fits(memory.peak)
    }
    checkpoints = saving and SavingPlan(checkpoint_bytes(shape, memory, workload), *saving)
    return TrainingPlan(model, workload, shape, memory, kept, recomputed, advice, checkpoints)


def _check_factors(shape: ModelShape, workload: Workload) -> None:
    """Reject LoRA factors that exceed the memory of all planned devices."""
    # Tracing such steps would take hours.
    # `full` is the model itself, whose size the user has not chosen.
    numbers = sum(count for name, count in shape.experts.items() if name != "full")
    needed = _FACTOR_BYTES * numbers
    largest = MOST_GPUS * DEVICES[-1].usable
    if workload.config is not None and needed > largest:
        ranks = ",".join(map(str, workload.config.ranks))
        raise InputError(
            f"Invalid ranks={ranks}: LoRA factors of {numbers:,} numbers take "
            f"{show_bytes(needed)} with their moments, and {MOST_GPUS} GPUs of "
            f"{DEVICES[-1].name} have {show_bytes(largest)}. Give smaller --ranks."
        )
