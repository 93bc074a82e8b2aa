"""From our settings to TRL's `SFTConfig`, with `--training_args.NAME VALUE` passed through."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from molf.errors import InputError
from molf.masking import mask_text
from molf.train.ownership import CHECKPOINTS
from molf.train.resolved import ResolvedSettings
from molf.train.settings import TrainSettings

# What a run decides itself, beside the options of its own. A user's value would be ignored, or
# break what the run directory promises.
_CONTROLLED = frozenset(
    {
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "completion_only_loss",
        "data_seed",
        "dataset_kwargs",
        "disable_tqdm",
        "do_eval",
        "do_train",
        "eval_strategy",
        "fp16",
        "gradient_checkpointing_kwargs",
        "include_num_input_tokens_seen",
        "load_best_model_at_end",
        "model_init_kwargs",
        "optim",
        "optim_args",
        "packing",
        "padding_free",
        "push_to_hub",
        "resume_from_checkpoint",
        "save_strategy",
        "shuffle_dataset",
        "trust_remote_code",
        "warmup_steps",
    }
)
_TOKENIZER = "the model's tokenizer brings its own"
_ONE_PROCESS = "molf train runs in one process on one device"
_IMPOSSIBLE = {
    "auto_find_batch_size": (
        "it changes the batch, and so the number of steps, while the schedule runs; give "
        "--per_device_train_batch_size"
    ),
    "assistant_only_loss": "the task says which tokens carry loss",
    "eval_on_start": "the run measures the model before and after itself",
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "chat_template_path": _TOKENIZER,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
    "parallelism_config": _ONE_PROCESS,
}
_OPTIONS = frozenset(option.name for option in fields(TrainSettings))


def sft_config(settings: ResolvedSettings) -> SFTConfig:
    """Return the trainer's arguments.

    Raises:
        InputError: A name of `training_args` is unknown or not the user's to set, a value is not
            allowed, or a tracker of `report_to` is not installed.
    """
    _check_trackers(settings.report_to)
    extra = parse_training_args(settings.training_args)
    _check_secrets(settings.training_args)
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    # transformers renamed gradient checkpointing; the old name warns, the new one is not in 5.13.
    checkpointing = next(
        name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _known()
    )
    arguments = {
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is not a number is to be seen
        "run_name": mask_text(settings.output_dir.name),  # trackers show it
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 is refused there
        **extra,  # these may be the user's; everything below has an option or is refused above
        "output_dir": str(settings.output_dir / CHECKPOINTS),
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_ratio,  # below 1 it is a share of the steps
        "max_grad_norm": settings.max_grad_norm,
        checkpointing: settings.gradient_checkpointing,
        f"{checkpointing}_kwargs": {"use_reentrant": False},
        "bf16": bf16,
        "seed": settings.seed,
        "logging_steps": settings.logging_steps,
        "save_strategy": "no" if settings.save_steps is None else "steps",
        "save_steps": settings.save_steps or 1,
        "save_total_limit": settings.save_total_limit,
        "report_to": list(settings.report_to),
        "disable_tqdm": True,  # molf shows its own progress
        "include_num_input_tokens_seen": "non_padding",
        # The data comes tokenized, with labels; nothing may be cut or packed behind our back.
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    if not settings.trains_dense:
        arguments |= {
            "learning_rate": settings.lora_learning_rate,
            "weight_decay": settings.lora_weight_decay,
        }
    try:
        config = SFTConfig(**arguments)
    except (ValueError, TypeError, ImportError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise InputError(f"The trainer does not accept these settings: {first_line}") from error
    _check_schedule(config)
    _check_accumulation(config)
    if config.world_size > 1:
        raise InputError(
            f"WORLD_SIZE={config.world_size}: molf train runs in one process. Start it without "
            "torchrun or accelerate launch."
        )
    if config.n_gpu > 1:
        raise InputError(
            f"{config.n_gpu} GPUs are visible: molf train uses one. Choose it with "
            "CUDA_VISIBLE_DEVICES."
        )
    return config


def _check_secrets(given: Mapping[str, str]) -> None:
    """Refuse what must not be recorded: the trainer's own files hold its arguments as they are."""
    for name, value in given.items():
        if mask_text(value) != value:
            raise InputError(
                f"training_args.{name} holds a secret, or an address with a query or a user, which "
                "checkpoints and trackers would record. Give it by the environment variable that "
                "its library reads, or leave it out."
            )


def _check_schedule(config: SFTConfig) -> None:
    """Make the schedule once, for an optimizer of nothing: the trainer does so after loading."""
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
        first_line = str(error).strip().split("\n")[0]
        raise InputError(
            f"training_args.lr_scheduler_kwargs={config.lr_scheduler_kwargs} does not go with "
            f"lr_scheduler_type={config.lr_scheduler_type.value}: {first_line}."
        ) from error


def _check_accumulation(config: SFTConfig) -> None:
    """Refuse the second way to accumulate gradients: `config.yaml` would say something else."""
    given = config.accelerator_config.gradient_accumulation_kwargs or {}
    if "num_steps" in given:
        raise InputError(
            "training_args.accelerator_config: num_steps of gradient_accumulation_kwargs is an "
            "option of its own: give --gradient_accumulation_steps."
        )


class _Parser(HfArgumentParser):
    """The Trainer's own parser, raising what argparse would print and exit with."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"training_args: {message}")


@cache
def _parser() -> _Parser:
    return _Parser(SFTConfig, allow_abbrev=False)


def parse_training_args(given: Mapping[str, str]) -> dict[str, Any]:
    """Give each value the type that SFTConfig declares for its name.

    Raises:
        InputError: A name is unknown or not the user's to set, or a value has the wrong type.
    """
    known = _known()
    tokens = []
    for name, value in given.items():
        if name in _CONTROLLED:
            raise InputError(f"training_args.{name} cannot be set: a run decides it itself.")
        if name in _IMPOSSIBLE:
            raise InputError(f"training_args.{name} cannot be set: {_IMPOSSIBLE[name]}.")
        if name.startswith("hub_"):
            raise InputError(
                f"training_args.{name} cannot be set: a run pushes nothing. Push model/ with the "
                "Hub's own tools."
            )
        if name == "use_liger_kernel" and find_spec("liger_kernel") is None:
            raise InputError(
                "training_args.use_liger_kernel needs liger-kernel, which is not installed."
            )
        if name in _OPTIONS:
            raise InputError(f"training_args.{name} is an option of its own: give --{name}.")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise InputError(f"training_args.{name} is no argument of TRL's SFTConfig.{hint}")
        tokens.append(f"--{name}={value}")
    parsed = _parser().parse_args(tokens)
    return {name: getattr(parsed, name) for name in given}


def _known() -> set[str]:
    return {option.name for option in fields(SFTConfig) if option.init}


def _check_trackers(names: tuple[str, ...]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        if name not in ("none", "all", *available):
            raise InputError(
                f"report_to={name} is unknown or not installed. Available here: "
                f"{', '.join(['none', *available])}."
            )
