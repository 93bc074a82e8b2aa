"""The plan of a training: parameters, memory, and changes that make it fit a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from molf.amounts import binary_size
from molf.core.config import MoLFConfig
from molf.errors import InputError
from molf.planning.advice import MOST_GPUS, Suggestion, suggestions
from molf.planning.devices import DEVICES, Device
from molf.planning.memory import MemoryPlan, Planner
from molf.planning.model_shape import ModelShape
from molf.planning.saving import Saving, SavingPlan, checkpoint_bytes
from molf.planning.traffic import (
    ShardedModel,
    StepBytes,
    Traffic,
    adapter_step,
    computation_seconds,
    folded_step,
)
from molf.planning.workload import Workload

_NOT_PLAIN = ("config", "unreached", "assignment")  # fields of a workload
_REQUIRED = 2  # loss and gradient norm, which molf train has the optimizer check
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
        traffic: The bytes that each of several GPUs sends in a step; None for one.
    """

    model: str
    workload: Workload
    shape: ModelShape
    memory: MemoryPlan
    without_checkpointing: MemoryPlan
    with_checkpointing: MemoryPlan
    advice: dict[Device, list[Suggestion]]
    saving: SavingPlan | None = None
    traffic: Traffic | None = None

    @property
    def fits(self) -> tuple[Device, ...]:
        """The sizes of GPU that it fits, of 24, 40, 80 and 141 GB."""
        return tuple(device for device in DEVICES if device.fits(self.memory.peak))

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
            "traffic": self.traffic.record() if self.traffic else None,
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
    return TrainingPlan(
        model,
        workload,
        shape,
        memory,
        kept,
        recomputed,
        advice,
        checkpoints,
        traffic_of(shape, workload),
    )


def traffic_of(shape: ModelShape, workload: Workload) -> Traffic | None:
    """Return the bytes that each GPU sends in a step of `fully_shard`; None for one GPU.

    Args:
        shape: The parameters.
        workload: The planned training.
    """
    gpus, shards = workload.devices, workload.devices_of_model
    if gpus == 1:
        return None
    is_mixed = workload.bf16 and workload.dtype == "float32"
    own = 2 if workload.dtype == "bfloat16" else 4
    adapter = shape.trained - sum(part.trained for part in shape.parts)
    sizes = ShardedModel(
        # PEFT's factors are in the decoder layers.
        layers=shape.parameters - shape.outside + (adapter if workload.has_adapter else 0),
        outside=shape.outside,
        trained=shape.trained if workload.has_adapter else shape.trained - adapter,
        weight_bytes=2 if is_mixed else own,
        gradient_bytes=own,
    )
    steps = _optimizer_steps(shape, workload, shards)
    return Traffic(
        gpus=gpus,
        shards=shards,
        fsdp=sizes.sent(gpus, shards, workload.passes),
        optimizer={name: step.sent(gpus, shards) for name, step in steps.items()},
        seconds=computation_seconds(
            shape.parameters,
            workload.batch_size * workload.length * workload.passes,
            trains_dense=workload.trains_dense,
            checkpointing=workload.checkpointing,
        ),
    )


def _optimizer_steps(shape: ModelShape, workload: Workload, shards: int) -> dict[str, StepBytes]:
    """Return the payloads of the optimizer's collectives, by what wins in all layers."""
    config = workload.config
    if config is None or workload.method == "lora":
        return {}
    terms = len(config.routing.score.terms)
    if not shape.routed:
        experts = len(config.ranks)
        trained = shape.trained_tensors + 2 * shape.layers  # A and B of all experts are one each
        return {"any": adapter_step(shape.layers, experts, trained, terms, _REQUIRED)}
    dense = sum(1 + layer.has_bias for layer in shape.routed)
    # The largest experts, for an upper limit.
    order = sorted(range(len(config.ranks)), key=lambda i: -config.ranks[i])
    lora = [1 + i for i in order[: config.top_k]]
    return {
        name: folded_step(
            shape.routed,
            config.ranks,
            shards,
            winners=[won] * len(shape.routed),
            others=shape.trained_tensors - dense,
            terms=terms,
            required=_REQUIRED,
        )
        for name, won in (("lora", lora), ("full", [0]))
        if name == "lora" or not config.freeze_base
    }


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
            f"{binary_size(needed)} with their moments, and {MOST_GPUS} GPUs of "
            f"{DEVICES[-1].name} have {binary_size(largest)}. Give smaller --ranks."
        )
