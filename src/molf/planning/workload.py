"""What is to be planned: a method and the shape of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from molf.core.config import MoLFConfig
from molf.core.options import (
    MissingLibraryError,
    OptimizerOptions,
    OptionError,
    check_exclusions,
)
from molf.errors import InputError

QUANTISABLE = ("molf-e", "lora")
METHODS = ("fft", "lora", "molf", "molf-e")
"""What can be planned; molf-e is MoLF-Efficient, LoRA experts alone on a frozen base."""
DTYPES = ("float32", "bfloat16")
DEVICES = ("cuda", "cpu")
QUANTISATIONS = ("load_in_4bit", "load_in_8bit")
"""The options that ask for a quantised base."""


@dataclass(frozen=True, kw_only=True)
class Workload(OptimizerOptions):
    """A training as far as its memory depends on it, with the options of its optimizer.

    Attributes:
        method: One of `METHODS`.
        config: What is adapted or routed; None for fft.
        batch_size: Sequences per forward pass on one device.
        length: Tokens of a sequence, padding included.
        accumulates: Whether gradients of earlier forward passes are kept through a later one.
        checkpointing: Whether activations are recomputed in the backward pass.
        dtype: Type of the weights, one of `DTYPES`.
        bf16: Whether the forward pass runs under bfloat16 autocast.
        device: Kind of device, one of `DEVICES`; its kernels need different temporaries.
        padded: Whether a batch holds sequences of different lengths. Attention then takes a mask,
            and the plan is that of the longest sequence.
        num_gpus: Devices that share weights, gradients and optimizer state.
        quantised: The option that asks for a quantised base, one of `QUANTISATIONS`, or None.
        unreached: Modules that no text reaches, which are frozen; found by the planner.

    Raises:
        InputError: A value is not allowed.
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
    num_gpus: int = 1
    quantised: str | None = None
    unreached: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every value that can be checked without the model."""
        words: dict[str, tuple[str | None, ...]] = {
            "method": METHODS,
            "dtype": DTYPES,
            "device": DEVICES,
            "quantised": (*QUANTISATIONS, None),
        }
        for name, allowed in words.items():
            value: Any = getattr(self, name)
            if value not in allowed:
                choices = ", ".join(choice for choice in allowed if choice)
                raise InputError(f"Invalid {name}={value!r}. Must be one of {choices}.")
        for name in ("batch_size", "length", "num_gpus"):
            if getattr(self, name) < 1:
                raise InputError(f"Invalid {name}={getattr(self, name)}. Must be at least 1.")
        if (self.config is None) != (self.method == "fft"):
            raise InputError(f"method={self.method} does not go with config={self.config}.")
        if self.config is not None and self.config.freeze_base != (self.method == "molf-e"):
            raise InputError(f"method={self.method} needs another freeze_base than its config has.")
        if self.method == "lora" and self.config is not None and len(self.config.ranks) > 1:
            raise InputError(
                f"Invalid ranks={','.join(map(str, self.config.ranks))} with method=lora. Must be "
                "one rank; molf and molf-e take several."
            )
        if self.quantised is not None and self.method not in QUANTISABLE:
            raise InputError(
                f"Invalid {self.quantised} with method={self.method}, which trains the base. "
                "Use --method molf-e or lora, or leave it out."
            )
        try:
            super().__post_init__()
            check_exclusions(
                {
                    **self.as_keywords(),
                    "gradient_accumulation_steps": "above 1" if self.accumulates else 1,
                    "num_gpus": self.num_gpus,
                    "float32_weights": self.dtype == "float32",
                }
            )
            self.check_libraries()
        except (OptionError, MissingLibraryError) as error:
            raise InputError(error.as_option) from error

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
        return self.method in ("fft", "molf")

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA factors are a PEFT adapter in the model; else the optimizer keeps them."""
        if self.config is None:
            return False
        return self.method != "molf" or self.config.lora_dropout > 0


def why_not_planned(method: str, kernels: str | None) -> str | None:
    """Return why a training with this method and these kernels cannot be planned, or None."""
    if method not in METHODS:
        return f"Invalid method={method}. Planned are {', '.join(METHODS)}."
    if kernels == "triton":
        # The kernels' temporaries differ from those of torch's operations, which are planned.
        return f"Invalid kernels={kernels}: eager steps are planned. Leave kernels out."
    return None
