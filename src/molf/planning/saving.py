"""Disk space of a training's checkpoints, and the pause for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from molf.planning.memory import MemoryPlan
    from molf.planning.model_shape import ModelShape
    from molf.planning.workload import Workload

BYTES_PER_SECOND = 1e9
"""Assumed speed of writing and hashing; the record of a run has its own."""

_COPY_PER_SECOND = 1e10  # assumed, from a device or a CPU to host memory


class Saving(NamedTuple):
    """How a training saves checkpoints.

    Attributes:
        kept: How many remain; None for all.
        in_background: Whether they are written while the training continues.
    """

    kept: int | None
    in_background: bool


@dataclass(frozen=True)
class SavingPlan:
    """The checkpoints of a training.

    Attributes:
        nbytes: Bytes of one, without the model that `save_steps` adds.
        kept: How many remain; None for all.
        in_background: Whether they are written while the training continues.
    """

    nbytes: int
    kept: int | None
    in_background: bool

    @property
    def pause_seconds(self) -> float:
        """Estimated pause of the training for one."""
        return self.nbytes / (_COPY_PER_SECOND if self.in_background else BYTES_PER_SECOND)

    @property
    def disk(self) -> int | None:
        """Most bytes on the disk at a time; None if all are kept."""
        # One more: the oldest is deleted after the newest is written.
        return None if self.kept is None else self.nbytes * (self.kept + 1)

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values; sizes are bytes."""
        return {
            "checkpoint": self.nbytes,
            "kept": self.kept,
            "disk": self.disk,
            "pause_seconds": round(self.pause_seconds, 3),
            "host_copy": self.nbytes if self.in_background else 0,
        }


def checkpoint_bytes(shape: ModelShape, memory: MemoryPlan, workload: Workload) -> int:
    """Return the bytes of a checkpoint: trained weights and the optimizer's state.

    Args:
        shape: The parameters.
        memory: The memory of each device.
        workload: The planned training.
    """
    in_model = sum(part.trained for part in shape.parts)
    weights = in_model * (2 if workload.dtype == "bfloat16" else 4)
    if workload.has_adapter:  # PEFT's factors are float32
        weights += 4 * (shape.trained - in_model)
    state = memory.host if workload.offloads else memory.moments + memory.factors
    return weights + state * workload.devices_of_model
