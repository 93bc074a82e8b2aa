"""Convert settings to TRL's `SFTConfig`; `--training_args.NAME VALUE` is passed through."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn

import torch
from accelerate.utils import TorchDynamoPlugin
from transformers import HfArgumentParser, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy
from trl import SFTConfig

from molf.errors import InputError, reason_of
from molf.job.record.ownership import CHECKPOINTS
from molf.job.settings.during import BY_LOSS, eval_strategy_of
from molf.job.settings.ranges import MOST_COUNTED
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.training_arguments import check_trackers, check_training_args, unknown_name
from molf.job.trainer.validation import EVAL_LOSS
from molf.masking import mask_text
from molf.ranks import connect
from molf.rendezvous import start_group

# Set by transformers, in the environment of the process, for `torch_compile`.
_COMPILATION = ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")

_FOR_GPUS = {
    "activation_offloading": "activations are in host memory already",
    "use_liger_kernel": "liger's kernels are Triton's, which need a GPU",
}


def sft_config(settings: ResolvedSettings) -> SFTConfig:
    """Return the trainer's arguments.

    Raises:
        InputError: A name of `training_args` is unknown or reserved, a value is not allowed, or a
            tracker of `report_to` is not installed.
    """
    check_trackers(settings.report_to)
    _check_available(settings.report_to)
    arguments = _arguments(settings)
    _start_processes(arguments, also_on_host=settings.fsdp_cpu_offload)
    try:
        with _own_environment():
            config = SFTConfig(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"The trainer rejects these settings: {reason_of(error)}") from error
    config.eval_strategy = IntervalStrategy.NO  # `EvaluationCallback` decides
    if (launched := config.mixed_precision) != ("bf16" if config.bf16 else "no"):
        raise InputError(
            f"Invalid ACCELERATE_MIXED_PRECISION={launched} (accelerate launch --mixed_precision, "
            "or its configuration) without bf16: autocast is an option of molf train. Launch with "
            "--mixed_precision no, or give --bf16."
        )
    _check_schedule(config)
    _check_accumulation(config)
    _check_for_gpus(config)
    _check_compilation(config)
    if config.world_size > 1:  # the process group exists now
        connect(config.ddp_timeout_delta)
    if config.n_gpu > 1:
        raise InputError(
            f"{config.n_gpu} GPUs are visible, and one process uses one. Start a process for each "
            f"GPU (torchrun --nproc_per_node {config.n_gpu} -m molf train ...), or choose one with "
            "CUDA_VISIBLE_DEVICES."
        )
    return config


def _arguments(settings: ResolvedSettings) -> dict[str, Any]:
    """Return the arguments of `SFTConfig` by name."""
    extra = parse_training_args(settings.training_args)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # transformers renamed gradient checkpointing: the old name warns, and 5.13 lacks the new one.
    checkpointing = next(
        name
        for name in ("activation_checkpointing", "gradient_checkpointing")
        if name in SFTConfig.__dataclass_fields__
    )
    evaluates = eval_strategy_of(settings) != "no"
    arguments: dict[str, Any] = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # show a loss of NaN
        "run_name": mask_text(settings.output_dir.name),  # trackers show it
        "use_cpu": not torch.accelerator.is_available(),  # without it, bf16 on CPU is rejected
        **extra,  # the user's: may replace those above; those below are rejected in it
        "output_dir": str(settings.output_dir / CHECKPOINTS),
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # a value below 1 is a share of the steps
        "max_grad_norm": settings.max_grad_norm,
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "bf16": bf16,
        "seed": settings.seed,
        "logging_steps": settings.logging_steps,
        "save_strategy": "no",  # `Checkpoints` decides
        "report_to": list(settings.report_to),
        "disable_tqdm": True,  # molf shows its own progress
        "include_num_input_tokens_seen": "non_padding",
        # For schedules that follow the loss, and `EarlyStoppingCallback`.
        **({"metric_for_best_model": EVAL_LOSS, "greater_is_better": False} if evaluates else {}),
        "train_sampling_strategy": settings.train_sampling_strategy,
        # The data is tokenized, packed and has labels: TRL must not truncate or pack it.
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    if not settings.trains_dense:
        arguments |= {
            "learning_rate": settings.lora_learning_rate,
            "weight_decay": settings.lora_weight_decay,
        }
    if settings.lr_scheduler_type in BY_LOSS:
        arguments |= {"eval_strategy": "steps", "eval_steps": 1}  # a check demands a strategy
    return arguments


def _start_processes(arguments: Mapping[str, Any], *, also_on_host: bool) -> None:
    """Start torch's process group on CPUs and CUDA devices, which transformers then uses.

    Args:
        arguments: Those of the trainer.
        also_on_host: Whether tensors in host memory are sent as well.
    """
    defaults = SFTConfig.__dataclass_fields__
    seconds = arguments.get("ddp_timeout", defaults["ddp_timeout"].default)
    if not 0 < seconds < MOST_COUNTED:
        raise InputError(
            f"Invalid training_args.ddp_timeout={seconds}. Must be at least 1 and below 2**31."
        )
    backend = arguments.get("ddp_backend", defaults["ddp_backend"].default)
    if backend is None and arguments["use_cpu"]:
        backend = "gloo"
    elif backend is None and torch.cuda.is_available():
        backend = "nccl"
    if backend == "nccl" and also_on_host:
        backend = "cpu:gloo,cuda:nccl"
    if backend is not None:
        start_group(backend, timedelta(seconds=seconds))


@contextmanager
def _own_environment() -> Iterator[None]:
    """Restore variables that transformers sets for accelerate, which reads them in every trainer.

    Without this, all later trainings of the process would be compiled. The trainer itself passes
    the arguments to accelerate.
    """
    before = {name: os.environ.get(name) for name in _COMPILATION}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_for_gpus(config: SFTConfig) -> None:
    """Reject arguments that need a GPU where there is none."""
    for name, reason in _FOR_GPUS.items():
        if getattr(config, name) and config.device.type == "cpu":
            raise InputError(f"Invalid training_args.{name} on {config.device}: {reason}.")


def _check_compilation(config: SFTConfig) -> None:
    """Check backend and mode of torch.compile, which are first used after the model is loaded."""
    if not config.torch_compile:
        return
    backend, mode = config.torch_compile_backend, config.torch_compile_mode
    try:
        TorchDynamoPlugin(backend=backend, mode=mode)
        torch.compile(torch.nn.Identity(), backend=backend, mode=mode)
    except (ValueError, RuntimeError) as error:
        given = f"torch_compile_backend={backend}" + (
            f" and torch_compile_mode={mode}" * bool(mode)
        )
        raise InputError(f"Invalid training_args.{given}: {reason_of(error)}.") from error


def _check_schedule(config: SFTConfig) -> None:
    """Check the schedule by creating it for a dummy optimizer."""
    # The trainer would create it only after the model is loaded.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    try:
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=2,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"Invalid training_args.lr_scheduler_kwargs={config.lr_scheduler_kwargs} with "
            f"lr_scheduler_type={config.lr_scheduler_type.value}: {reason_of(error)}."
        ) from error


def _check_accumulation(config: SFTConfig) -> None:
    """Reject accelerate's own option for gradient accumulation."""
    # It would override the number that is recorded in config.yaml.
    given = config.accelerator_config.gradient_accumulation_kwargs or {}
    if "num_steps" in given:
        raise InputError(
            "training_args.accelerator_config: num_steps of gradient_accumulation_kwargs is an "
            "option of its own: give --gradient_accumulation_steps."
        )


class _Parser(HfArgumentParser):
    """transformers' parser; it raises an InputError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"training_args: {message}")


@cache
def _parser() -> _Parser:
    return _Parser(SFTConfig, allow_abbrev=False)


def parse_training_args(given: Mapping[str, str]) -> dict[str, Any]:
    """Convert each value to the type that SFTConfig declares.

    Raises:
        InputError: A name is unknown or reserved, or a value has the wrong type.
    """
    check_training_args(given)
    known = {option.name for option in fields(SFTConfig) if option.init}
    for name in given:  # again, in case the source of SFTConfig was not found above
        if name not in known:
            raise unknown_name(name, known)
    tokens = [f"--{name}={value}" for name, value in given.items()]
    parsed = _parser().parse_args(tokens)
    return {name: getattr(parsed, name) for name in given}


def _check_available(names: tuple[str, ...]) -> None:
    """Check trackers against those that transformers finds, also by environment variables."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in ("none", "all", *available):
            raise InputError(
                f"report_to={name} is unknown or not installed. Available here: "
                f"{', '.join(['none', *available])}."
            )
