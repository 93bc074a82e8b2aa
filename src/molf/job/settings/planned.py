"""The workload of a training, for `molf plan` and the dry run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from molf.core.config import MoLFConfig
from molf.core.model.quantised import Quantisation, quantisation_of
from molf.errors import InputError
from molf.job.settings.quantised_base import check_beside_quantised
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.settings import TrainSettings
from molf.planning.quantised_base import planned_as
from molf.planning.workload import QUANTISABLE, Workload

_UNPLANNED = ("activation_offloading", "torch_compile", "use_liger_kernel")
_NO = ("false", "no", "f", "n", "0")


def workload_of(
    settings: ResolvedSettings,
    *,
    length: int,
    padded: bool,
    device: str,
    quantised: str | None,
    num_gpus: int = 1,
    num_nodes: int = 1,
    shards: int = 0,
) -> Workload:
    """Return the workload of a training for `molf.planning`.

    Args:
        settings: The settings of the training, with a method of `planning.workload.METHODS`.
        length: Tokens of the longest example.
        padded: Whether a batch holds examples of different lengths.
        device: `cuda` or `cpu`.
        quantised: `load_in_4bit`, `load_in_8bit` or None.
        num_gpus: Devices of each machine.
        num_nodes: Machines.
        shards: Devices that share weights, gradients and state; 0 for all.

    Raises:
        InputError: The options exclude each other.
    """
    return Workload(
        method=settings.method,
        config=settings.method_config,
        batch_size=settings.per_device_train_batch_size,
        length=length,
        accumulates=settings.gradient_accumulation_steps > 1,
        passes=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing,
        dtype=settings.dtype,
        bf16=device == "cuda" if settings.bf16 is None else settings.bf16,
        device=device,
        padded=padded,
        joined=settings.joins_examples,
        num_gpus=num_gpus,
        num_nodes=num_nodes,
        shards=shards,
        cpu_offload=settings.fsdp_cpu_offload and num_gpus * num_nodes > 1,
        quantised=quantised,
        assignment=settings.assigned,
        lora_dropout=float(settings.lora_dropout or 0.0) if settings.assigned else 0.0,
        use_dora=settings.use_dora,
        **settings.optimizer_options.as_keywords(),
    )


def planned_quantisation(model: Any, settings: ResolvedSettings) -> str | None:
    """Return the option for the quantised base of a planned training: stored, or quantised by molf.

    Args:
        model: The model's transformers configuration.
        settings: The settings of the training.

    Raises:
        InputError: The settings exclude the stored base, or it cannot be planned.
    """
    stored: Quantisation | None = quantisation_of(model)
    option = settings.quantised
    if stored is None:
        return option
    base = f"model {settings.model} (stored quantised: {stored})"
    planned = planned_as(stored)
    if planned is None:
        raise InputError(
            f"Invalid {base}: of stored quantised models, only those of bitsandbytes can be "
            "planned (4-bit, 8-bit). Give one of these, or the unquantised model."
        )
    check_beside_quantised(settings, base, "give the unquantised model")
    if option not in (None, planned):
        raise InputError(
            f"Invalid {option} with {base}. Leave {option} out, or give the unquantised model."
        )
    return planned


def planned_attention(model: Any, settings: TrainSettings) -> None:
    """Set the attention of a configuration to be planned, if its memory differs.

    `eager` keeps the scores of all pairs of tokens. The others are planned as transformers' choice,
    because their libraries need not be installed here.

    Args:
        model: The model's transformers configuration; changed in place.
        settings: The settings of the training.
    """
    if settings.attn_implementation == "eager":
        model._attn_implementation = "eager"


def warn_of_unplanned(settings: TrainSettings) -> None:
    """Warn of arguments of the trainer that change the memory, which the plan leaves out.

    Warns:
        UserWarning: There are some.
    """
    given = settings.training_args
    names = [
        f"training_args.{name}"
        for name, value in given.items()
        if name.startswith(_UNPLANNED) and value.lower() not in _NO
    ]
    if names:
        warnings.warn(f"The plan is without {', '.join(names)}.", stacklevel=3)


def configs_with_frozen_base(settings: TrainSettings) -> dict[str, MoLFConfig]:
    """Return the adapters of the methods that freeze the base, by method, with these settings."""
    configs = {}
    for method in QUANTISABLE:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the user has not chosen these settings
                config = replace(settings, method=method).method_config
        except InputError:  # an option is for other methods
            continue
        if config is not None:
            configs[method] = config
    return configs
