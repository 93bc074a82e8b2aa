"""What is to be planned: a method and the shape of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from molf.core.config import MoLFConfig
from molf.core.names import ROUNDINGS, STATE_DTYPES
from molf.errors import InputError

QUANTISABLE = ("lora", "molf-e")
METHODS = ("fft", "lora", "molf", "molf-e")
"""What can be planned; molf-e is MoLF-Efficient, LoRA experts alone on a frozen base."""
DTYPES = ("float32", "bfloat16")
DEVICES = ("cuda", "cpu")
QUANTISATIONS = ("load_in_4bit", "load_in_8bit")
"""The options that ask for a quantised base."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training as far as its memory depends on it.

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
        weight_rounding: How bfloat16 weights are written; None for exact.
        state_dtype: How moments of dense weights are kept.
        grad_accumulation_dtype: Type of the gradients; None for that of the weights.
        optimizer_in_backward: Whether steps are taken in the backward pass.
        state_offload: Whether the optimizer's state is in host memory; on CUDA only.
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
    weight_rounding: str | None = None
    state_dtype: str = "float32"
    grad_accumulation_dtype: str | None = None
    optimizer_in_backward: bool = False
    state_offload: bool = False
    quantised: str | None = None
    unreached: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every value that can be checked without the model."""
        words: dict[str, tuple[str | None, ...]] = {
            "method": METHODS,
            "dtype": DTYPES,
            "device": DEVICES,
            "weight_rounding": (*ROUNDINGS, None),
            "state_dtype": STATE_DTYPES,
            "grad_accumulation_dtype": ("float32", None),
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
        self._check_storage()

    def _check_storage(self) -> None:
        """Refuse what `molf train` refuses."""
        if self.weight_rounding is not None and self.dtype == "float32":
            raise InputError(
                f"Invalid weight_rounding={self.weight_rounding} with dtype=float32: there is "
                "nothing to round. Give --dtype bfloat16, or leave weight_rounding out."
            )
        if self.state_dtype == "8bit" and find_spec("torchao") is None:
            raise InputError(
                "Invalid state_dtype=8bit: it needs torchao. Install it with pip install "
                "'molf[torchao]', or give --state_dtype float32."
            )
        for name in ("accumulates", "grad_accumulation_dtype"):
            if self.optimizer_in_backward and getattr(self, name):
                given = {"accumulates": "gradient_accumulation_steps above 1"}.get(name, name)
                raise InputError(
                    f"Invalid {given} with optimizer_in_backward: each layer moves as soon as its "
                    "own gradient is there. Leave one of the two out."
                )
        if self.steps_in_backward and self.num_gpus > 1:
            raise InputError(
                f"Invalid num_gpus={self.num_gpus} with optimizer_in_backward: a layer would move "
                "before its gradients are summed over them. Leave one of the two out."
            )
        if self.quantised is not None:
            if self.method not in QUANTISABLE:
                raise InputError(
                    f"Invalid {self.quantised} with method={self.method}, which trains the base. "
                    "Use --method molf-e or lora, or leave it out."
                )
            if self.dtype != "float32":
                raise InputError(
                    f"Invalid dtype={self.dtype} with {self.quantised}: what is not quantised is "
                    "float32. Leave one of the two out."
                )

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


def method_config(
    method: str,
    *,
    ranks: tuple[int, ...] | None = None,
    lora_dropout: float | None = None,
    **options: Any,
) -> MoLFConfig | None:
    """What a method adapts or routes; None for fft.

    Args:
        method: One of `METHODS`.
        ranks: One per LoRA expert; the method's default if not given. For lora they are summed,
            as `molf train` does.
        lora_dropout: Dropout before the factors; the method's default if not given.
        **options: Further settings of `MoLFConfig`.

    Raises:
        InputError: A value is not allowed.
    """
    if method == "fft":
        return None
    defaults = _DEFAULTS[method]
    ranks = defaults["ranks"] if ranks is None else ranks
    try:
        return MoLFConfig(
            ranks=(sum(ranks),) if method == "lora" else ranks,
            lora_dropout=defaults["lora_dropout"] if lora_dropout is None else lora_dropout,
            freeze_base=method == "molf-e",
            **options,
        )
    except ValueError as error:
        raise InputError(str(error)) from error


# Those of `molf train`; for molf-e the paper's.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"ranks": (32,), "lora_dropout": 0.05},
    "molf": {"ranks": (128,), "lora_dropout": 0.0},
    "molf-e": {"ranks": (32, 128), "lora_dropout": 0.05},
}
