"""`molf plan`."""

from __future__ import annotations

import json as json_module
import sys
import warnings
from dataclasses import dataclass, fields
from typing import Annotated, Any

from cyclopts import Parameter

from molf.core.names import ROUNDINGS, STATE_DTYPES
from molf.errors import InputError
from molf.masking import mask
from molf.plan.workload import (
    DEVICES,
    DTYPES,
    METHODS,
    QUANTISATIONS,
    Workload,
    method_config,
)
from molf.train.converters import numbers, patterns
from molf.train.defaults import COMMON, STORAGE
from molf.train.settings import DATA, METHOD, MODEL, MOST_COUNTED, OPTIMIZATION, OUTPUT


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of `molf plan`; those that `molf train` has mean the same."""

    model: Annotated[str, Parameter(group=MODEL)]
    """A local directory in transformers format, or a Hub id; its config.json alone is read."""
    max_length: Annotated[int, Parameter(group=DATA)] = 1024
    """Tokens of the longest example; a batch of such examples is planned."""
    gradient_checkpointing: Annotated[bool, Parameter(group=MODEL)] = False
    """Recompute activations in the backward pass: slower, less memory."""
    bf16: Annotated[bool | None, Parameter(group=MODEL, show_default="on cuda")] = None
    """bfloat16 autocast in training."""
    dtype: Annotated[str, Parameter(choices=DTYPES, group=MODEL)] = "float32"
    """Type of the weights."""
    load_in_4bit: Annotated[bool, Parameter(group=MODEL, negative=())] = False
    """A frozen 4-bit base (bitsandbytes, NF4): molf-e, lora."""
    load_in_8bit: Annotated[bool, Parameter(group=MODEL, negative=())] = False
    """The same with 8 bits (LLM.int8)."""
    device: Annotated[str, Parameter(choices=DEVICES, group=MODEL)] = "cuda"
    """Kind of device that the training will run on."""
    num_gpus: Annotated[int, Parameter(group=MODEL)] = 1
    """Devices that share weights, gradients and optimizer state (full sharding): an estimate."""

    method: Annotated[str, Parameter(choices=METHODS, group=METHOD)] = "molf"
    """fft: all weights. lora: one adapter. molf: routed per layer and step. molf-e: frozen base."""
    ranks: Annotated[
        tuple[int, ...] | None,
        Parameter(group=METHOD, converter=numbers(int), n_tokens=1, show_default="by method"),
    ] = None
    """Rank of each LoRA expert, separated by commas."""
    lora_dropout: Annotated[float | None, Parameter(group=METHOD, show_default="by method")] = None
    """Dropout before the LoRA factors."""
    top_k: Annotated[int, Parameter(group=METHOD)] = 1
    """How many experts of a layer take each update."""
    target_modules: Annotated[
        str | tuple[str, ...], Parameter(group=METHOD, converter=patterns, n_tokens=1)
    ] = "all-linear"
    """Layers to adapt: all-linear, name endings separated by commas, or a regular expression."""
    exclude_modules: Annotated[
        str | tuple[str, ...], Parameter(group=METHOD, converter=patterns, n_tokens=1)
    ] = ("lm_head",)
    """Layers never to adapt, in the same form."""
    freeze_rest: Annotated[
        bool | None, Parameter(group=METHOD, show_default="False with molf, True with molf-e")
    ] = None
    """With molf and molf-e, freeze what is not routed (norms, embeddings, biases)."""

    per_device_train_batch_size: Annotated[int, Parameter(group=OPTIMIZATION)] = COMMON[
        "per_device_train_batch_size"
    ]
    """Examples per forward pass."""
    gradient_accumulation_steps: Annotated[
        int | None,
        Parameter(
            group=OPTIMIZATION,
            show_default=f"{COMMON['gradient_accumulation_steps']}; 1 with optimizer_in_backward",
        ),
    ] = None
    """Forward passes per optimizer step."""
    weight_rounding: Annotated[
        str | None, Parameter(choices=ROUNDINGS, group=OPTIMIZATION, show_default="exact")
    ] = None
    """How fft and molf write bfloat16 weights: exact (as float32), stochastic, or nearest."""
    state_dtype: Annotated[str, Parameter(choices=STATE_DTYPES, group=OPTIMIZATION)] = "float32"
    """How fft and molf keep the moments of weights: float32, or 8bit (needs torchao)."""
    grad_accumulation_dtype: Annotated[
        str | None,
        Parameter(choices=("float32",), group=OPTIMIZATION, show_default="that of the weights"),
    ] = None
    """float32 adds the gradients of bfloat16 weights up without rounding (fft, molf)."""
    optimizer_in_backward: Annotated[bool, Parameter(group=OPTIMIZATION)] = False
    """Move each layer in the backward pass and free its gradient; no clipping, no accumulation."""
    state_offload: Annotated[bool, Parameter(group=OPTIMIZATION)] = False
    """Keep the optimizer's state in host memory, on the GPU layer by layer (not run on one yet)."""

    json: Annotated[bool, Parameter(group=OUTPUT, negative=())] = False
    """Print the plan as JSON, sizes in bytes."""

    def __post_init__(self) -> None:
        """Check the numbers; names are checked with the model."""
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "num_gpus",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Invalid {name}={value}. Must be finite and greater than 0.")
            if value is not None and value >= MOST_COUNTED:
                raise InputError(f"Invalid {name}={value}. Must be below 2**31.")
        if max(self.ranks or (0,)) >= MOST_COUNTED:
            given = ",".join(map(str, self.ranks or ()))
            raise InputError(f"Invalid ranks={given}. Must be below 2**31.")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("Invalid load_in_4bit with load_in_8bit. Give one of them.")
        if not self.model:
            raise InputError("Invalid model: empty. Give a local directory or a Hub id.")


def plan_model(options: PlanOptions) -> None:
    """Say what a training will take, from the model's configuration alone.

    Args:
        options: The options.
    """
    from molf.train.model_path import check_model

    check_model(options.model)
    from molf.train.libraries import quiet_libraries

    with quiet_libraries():
        from molf.plan.quantised_base import planned_quantisation
        from molf.plan.request import plan_training, read_model_config

        adapters: dict[str, Any] = {
            "ranks": options.ranks,
            "lora_dropout": options.lora_dropout,
            "target_modules": options.target_modules,
            "exclude_modules": options.exclude_modules,
        }
        if options.method in ("molf", "molf-e"):
            adapters |= {"top_k": options.top_k, "freeze_rest": options.freeze_rest}
        accumulation = options.gradient_accumulation_steps
        if accumulation is None:
            in_backward = options.optimizer_in_backward
            accumulation = 1 if in_backward else COMMON["gradient_accumulation_steps"]
        asked = [name for name in QUANTISATIONS if getattr(options, name)]
        config = read_model_config(options.model)
        workload = Workload(
            method=options.method,
            config=method_config(options.method, **adapters),
            batch_size=options.per_device_train_batch_size,
            length=options.max_length,
            accumulates=accumulation > 1,
            checkpointing=options.gradient_checkpointing,
            dtype=options.dtype,
            bf16=options.device == "cuda" if options.bf16 is None else options.bf16,
            device=options.device,
            padded=options.per_device_train_batch_size > 1,
            num_gpus=options.num_gpus,
            weight_rounding=options.weight_rounding,
            state_dtype=options.state_dtype,
            grad_accumulation_dtype=options.grad_accumulation_dtype,
            optimizer_in_backward=options.optimizer_in_backward,
            state_offload=options.state_offload,
            quantised=planned_quantisation(
                options.model, config, options.method, options.dtype, asked[0] if asked else None
            ),
        )
        _warn_of_unused(options)
        plan = plan_training(options.model, config, workload)
    if options.json:
        sys.stdout.write(json_module.dumps(mask(plan.record()), indent=2) + "\n")
        return
    from molf.cli.plan_report import print_plan

    print_plan(plan)


def _warn_of_unused(options: PlanOptions) -> None:
    """Warn of options that `molf train` would not use with this method either."""
    unused = {"lora": STORAGE, "molf-e": ("weight_rounding",)}.get(options.method, ())
    defaults = {field.name: field.default for field in fields(options)}
    given = [name for name in unused if name in defaults]
    given = [name for name in given if getattr(options, name) != defaults[name]]
    if given:
        warnings.warn(
            f"Without effect with method={options.method}: {', '.join(given)}.", stacklevel=2
        )
