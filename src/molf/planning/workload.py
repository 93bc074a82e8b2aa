"""The training to plan: a method and the shape of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from molf.core.assignment.assignment import Assignment
from molf.core.config import MoLFConfig
from molf.core.options import (
    OptimizerOptions,
    OptionError,
    check_exclusions,
    score_exclusions,
)
from molf.errors import InputError

QUANTISABLE = ("molf-e", "lora")
METHODS = ("fft", "lora", "molf", "molf-e", "hybrid")
"""Methods that can be planned."""
DEVICES = ("cuda", "cpu")
QUANTISATIONS = ("load_in_4bit", "load_in_8bit")
"""The options that ask for a quantised base."""


@dataclass(frozen=True, kw_only=True)
class Workload(OptimizerOptions):
    """A training as far as its memory depends on it, with the options of its optimizer.

    Attributes:
        method: One of `METHODS`.
        config: The experts, or the adapter; None for fft and hybrid.
        assignment: The assignment of hybrid; None for other methods.
        lora_dropout: Dropout of the adapter of hybrid.
        use_dora: Whether the adapter of hybrid has magnitudes.
        batch_size: Sequences per forward pass on one device.
        length: Tokens of a sequence, padding included.
        accumulates: Whether gradients of earlier forward passes are kept through a later one.
        checkpointing: Whether activations are recomputed in the backward pass.
        dtype: Type of the weights, "float32" or "bfloat16".
        bf16: Whether the forward pass runs under bfloat16 autocast.
        device: Kind of device, one of `DEVICES`; its kernels need different temporaries.
        padded: Whether a batch holds sequences of different lengths. Attention then takes a mask,
            and the plan is that of the longest sequence.
        joined: Whether the sequences of a batch lie in one row of `batch_size * length` tokens,
            with a mask between them.
        passes: Forward passes of a step on one device.
        num_gpus: Devices of each machine.
        num_nodes: Machines.
        shards: Devices that share weights, gradients and optimizer state; 0 for all, else a
            divisor of their number.
        cpu_offload: Whether several devices keep their shards and the state in host memory.
        quantised: The option that asks for a quantised base, one of `QUANTISATIONS`, or None.
        unreached: Modules that no text reaches, which are frozen; found by the planner.

    Raises:
        InputError: Options exclude each other, the score or several devices; or several devices
            have a quantised base.
    """

    method: str
    config: MoLFConfig | None
    batch_size: int
    length: int
    accumulates: bool = False
    checkpointing: bool = False
    dtype: str = "float32"
    bf16: bool = False
    device: str = "cuda"
    padded: bool = True
    joined: bool = False
    passes: int = 1
    num_gpus: int = 1
    num_nodes: int = 1
    shards: int = 0
    cpu_offload: bool = False
    quantised: str | None = None
    unreached: tuple[str, ...] = ()
    assignment: Assignment | None = None
    lora_dropout: float = 0.0
    use_dora: bool = False

    def __post_init__(self) -> None:
        """Check the options beside each other, the score and the number of devices."""
        # All others come from `TrainSettings`, which has checked them.
        score = {} if self.config is None else score_exclusions(self.config.score)
        try:
            check_exclusions({**self.as_keywords(), **score, "num_gpus": self.devices})
        except OptionError as error:
            raise InputError(error.as_option) from error
        if self.quantised is not None and self.devices > 1:
            name = "num_gpus" if self.num_gpus > 1 else "num_nodes"
            raise InputError(
                f"Invalid {name}={getattr(self, name)} with {self.quantised}: a quantised base is "
                "not divided over GPUs, so each of them takes the plan of one. Leave one of the "
                "two out."
            )

    @property
    def devices(self) -> int:
        """All devices of the training."""
        return self.num_gpus * self.num_nodes

    @property
    def devices_of_model(self) -> int:
        """Devices that share one model."""
        return self.shards or self.devices

    @property
    def steps_in_backward(self) -> bool:
        """Whether the optimizer takes its steps in the backward pass; lora's never does."""
        return self.optimizer_in_backward and self.method != "lora"

    @property
    def offloads(self) -> bool:
        """Whether states are in host memory; lora's optimizer is torch's, and keeps them."""
        return self.state_offload and self.method != "lora" and self.device == "cuda"

    @property
    def trains_dense(self) -> bool:
        """Whether the model's own weights are trained."""
        if self.assignment is not None:
            return bool(self.assignment.full) or not self.assignment.freeze_rest
        return self.method in ("fft", "molf")

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA factors are a PEFT adapter in the model; else the optimizer keeps them."""
        if self.assignment is not None:
            return bool(self.assignment.lora)
        if self.config is None:
            return False
        return self.method != "molf" or self.config.lora_dropout > 0


def why_not_planned(method: str, kernels: str | None) -> str | None:
    """Return why a training with this method and these kernels cannot be planned, or None."""
    if method not in METHODS:
        return f"Invalid method={method}. Only {', '.join(METHODS)} can be planned."
    if kernels == "triton":
        # The kernels' temporaries differ from those of torch's operations, which are planned.
        return f"Invalid kernels={kernels}: only eager steps can be planned. Leave kernels out."
    return None
