"""Compute the memory peak of a training, in bytes, on one device or several.

The peak is the larger of two phases: the forward and backward pass (weights, optimizer state,
activations, gradients so far) and the optimizer step (weights, state, all gradients, temporaries).
With steps in the backward pass there is only the first phase; its activations include gradients
and temporaries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from molf.planning.model_shape import ModelShape, describe_model
from molf.planning.trace import PassTrace, StepTrace, trace_pass, trace_step
from molf.planning.traffic import buffer_bytes
from molf.planning.trainable import find_reach_of
from molf.planning.workload import Workload

_OUTSIDE = ("embeddings", "head")  # parts outside of decoder layers; norms there are small


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of a training on each device, in bytes.

    Attributes:
        weights: All parameters and buffers, including an adapter's.
        gradients: Gradients of all trained parameters.
        moments: First and second moments, and the low halves of bfloat16 weights.
        factors: LoRA factors that the optimizer keeps.
        activations: Memory of the forward and backward pass at its peak, without gradients.
        pass_gradients: Gradients that exist at that peak.
        transient: Temporaries of the optimizer's step.
        gathered: With several devices, weights that are temporarily whole on each, and gradients
            before they are reduced.
        exchanged: With several devices, buffers of the collectives of the optimizer's step.
        host: State in pinned host memory, with offload; part of no peak. With offloaded shards
            also their weights and gradients, and the temporaries of the optimizer's step.
    """

    weights: int
    gradients: int
    moments: int
    factors: int
    activations: int
    pass_gradients: int
    transient: int
    gathered: int = 0
    exchanged: int = 0
    host: int = 0

    @property
    def held(self) -> int:
        """Memory held throughout: weights and optimizer state."""
        return self.weights + self.moments + self.factors

    @property
    def pass_peak(self) -> int:
        """Peak of the forward and backward pass."""
        return self.held + self.pass_gradients + self.activations + self.gathered

    @property
    def step_peak(self) -> int:
        """Peak of the optimizer's step."""
        return self.held + self.gradients + self.transient + self.exchanged

    @property
    def peak(self) -> int:
        """Peak of the training."""
        return max(self.pass_peak, self.step_peak)

    def record(self) -> dict[str, int]:
        """Return all figures by name."""
        return {**vars(self), "pass_peak": self.pass_peak, "step_peak": self.step_peak} | {
            "peak": self.peak
        }


class Planner:
    """Plans trainings of one model; traces that they share are cached.

    Args:
        config: The model's transformers configuration.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        # Advice plans dozens of workloads, most of which share a pass or a step.
        self._pass = lru_cache(maxsize=None)(lambda w: trace_pass(config, w))
        self._step = lru_cache(maxsize=None)(lambda w: trace_step(config, w))
        self._shape = lru_cache(maxsize=None)(lambda w: describe_model(config, w))
        self._reach = lru_cache(maxsize=None)(lambda: find_reach_of(config))

    def shape(self, workload: Workload) -> ModelShape:
        """Count the parameters.

        Raises:
            InputError: The model cannot be made, or no layer can be adapted.
        """
        return self._shape(_shape_alone(self._reached(workload)))

    def step_peak(self, workload: Workload) -> int:
        """Return the peak of the optimizer's step on each device; faster than `memory`."""
        return self._plan(self._reached(workload), PassTrace(0, 0)).step_peak

    def memory(self, workload: Workload) -> MemoryPlan:
        """Plan the memory of each device.

        Raises:
            InputError: The model cannot be made or traced without data, or no layer can be adapted.
        """
        workload = self._reached(workload)
        # A device runs its own batch, so the pass does not depend on their number.
        alone = replace(workload, passes=1, num_gpus=1, num_nodes=1, shards=0, cpu_offload=False)
        return self._plan(workload, self._pass(alone))

    def _reached(self, workload: Workload) -> Workload:
        """Return the workload without modules that text input does not reach, as in training."""
        reach = self._reach()
        left_out = (*reach.unreached, *(reach.bypassed if workload.has_adapter else ()))
        if workload.unreached or not left_out:
            return workload
        config = None if workload.config is None else workload.config.without(left_out)
        assignment = workload.assignment
        if assignment is not None:
            adapted = {layer.name for layer in assignment.lora}
            bypassed = [name for name in reach.bypassed if name in adapted]
            assignment = assignment.without((*reach.unreached, *bypassed))
        return replace(workload, config=config, assignment=assignment, unreached=reach.unreached)

    def _plan(self, workload: Workload, passing: PassTrace) -> MemoryPlan:
        shape = self.shape(workload)
        step: StepTrace = self._step(_shape_alone(workload))
        plan = MemoryPlan(
            weights=shape.weight_bytes,
            gradients=step.gradients,
            moments=0 if workload.offloads else step.moments,
            factors=0 if workload.offloads else step.factors,
            host=step.pinned if workload.offloads else 0,
            activations=passing.activations,
            pass_gradients=passing.gradients,
            transient=step.transient,
        )
        return _sharded(plan, shape, workload)


def _shape_alone(workload: Workload) -> Workload:
    """Return the workload with defaults for all that weights and optimizer do not depend on."""
    return replace(
        workload,
        batch_size=1,
        length=1,
        accumulates=False,
        checkpointing=False,
        bf16=False,
        padded=False,
        passes=1,
        num_gpus=1,
        num_nodes=1,
        shards=0,
        cpu_offload=False,
    )


def _sharded(plan: MemoryPlan, shape: ModelShape, workload: Workload) -> MemoryPlan:
    """Divide weights, gradients and state over devices, as FSDP2's full sharding does."""
    devices = workload.devices_of_model
    if devices == 1:
        return plan
    # Each device holds the activations of its own batch. The step's temporaries are those of its
    # own rows; the far LoRA factors are cut like all state.
    split = ("weights", "gradients", "moments", "factors", "pass_gradients", "transient", "host")
    parts = {name: -(-getattr(plan, name) // devices) for name in split}
    # Whole on each device are the modules outside of decoder layers and their gradients, one layer
    # with its gradients, and the next layer, which is gathered ahead; beside them the buffer that
    # reduces gradients, of a layer or, at the end, of the rest. A mixed-precision policy gathers in
    # bfloat16 and reduces in float32.
    is_mixed = workload.bf16 and workload.dtype == "float32"
    layer = shape.layer_bytes * min(shape.trained / shape.parameters, 1.0)
    rest = shape.outside_bytes * shape.trained_share(_OUTSIDE)
    whole = shape.outside_bytes + rest
    in_layers, at_the_end = whole + 2 * shape.layer_bytes + layer, whole
    factor = 0.5 if is_mixed else 1.0
    gathered = max(factor * in_layers + layer, factor * at_the_end + rest)
    exchanged = 0
    if shape.routed and workload.config is not None:
        exchanged = buffer_bytes(shape.routed, workload.config.ranks, devices)
    sharded = replace(plan, **parts, gathered=round(gathered), exchanged=exchanged)
    return _offloaded(sharded) if workload.cpu_offload else sharded


def _offloaded(plan: MemoryPlan) -> MemoryPlan:
    """Move shards, gradients, state and the optimizer's step to host memory (CPUOffloadPolicy).

    A device keeps activations, whole weights and gradients, and buffers of the collectives.
    """
    moved = ("weights", "gradients", "moments", "factors", "pass_gradients", "transient")
    host = sum(getattr(plan, name) for name in moved if name != "pass_gradients")
    return replace(plan, **dict.fromkeys(moved, 0), host=host)
