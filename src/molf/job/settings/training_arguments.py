"""Check `--training_args.NAME VALUE` and `--report_to` without importing TRL."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from importlib.util import find_spec

from molf.errors import InputError
from molf.job.settings.converters import TOO_LARGE, is_too_large
from molf.job.settings.declared_fields import package_folder, sft_config_fields
from molf.job.settings.settings import TrainSettings
from molf.masking import mask_text
from molf.shown import suggestion

# Arguments set by the run, in addition to those with an option of molf. A user's value would be
# ignored, or would break the run directory.
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
        "fp16",
        "gradient_checkpointing_kwargs",
        "greater_is_better",
        "include_num_input_tokens_seen",
        "logging_nan_inf_filter",
        "metric_for_best_model",
        "model_init_kwargs",
        "optim",
        "optim_args",
        "push_to_hub",
        "resume_from_checkpoint",
        "save_strategy",
        "shuffle_dataset",
        "trust_remote_code",
        "warmup_steps",
    }
)
_TOKENIZER = "the model's tokenizer brings its own"
_DEVICES = "molf train divides the model itself: start several processes, and give --fsdp"
_IMPOSSIBLE = {
    "auto_find_batch_size": (
        "it changes the batch, and so the number of steps, while the schedule runs; give "
        "--per_device_train_batch_size"
    ),
    "load_best_model_at_end": "give --keep_best",
    "assistant_only_loss": "the task defines which tokens carry loss",
    "packing_strategy": "packing is bfd (best-fit decreasing), which cuts no example",
    "length_column_name": "lengths are those of the tokens",
    "eval_packing": "examples are never packed in evaluation",
    "eval_on_start": "the run measures the model before and after itself",
    "ignore_data_skip": "a resumed training continues at the example where it stopped",
    "enable_jit_checkpoint": "a run writes a checkpoint at SIGTERM itself",
    "restore_callback_states_from_checkpoint": "a resumed training restores them itself",
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "chat_template_path": _TOKENIZER,
    "fsdp": _DEVICES,
    "fsdp_config": _DEVICES,
    "deepspeed": _DEVICES,
    "parallelism_config": _DEVICES,
}
# Of the trainer's own preparation of data, evaluation and saving, which a run does not use.
_WITHOUT_EFFECT = frozenset(
    {
        "batch_eval_metrics",
        "bf16_full_eval",
        "dataset_text_field",
        "do_predict",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "fp16_full_eval",
        "include_for_metrics",
        "label_names",
        "optim_target_modules",
        "prediction_loss_only",
        "save_on_each_node",
        "save_only_model",
        "truncation_mode",
    }
)
_REFUSED = _CONTROLLED | set(_IMPOSSIBLE) | _WITHOUT_EFFECT
_OPTIONS = frozenset(option.name for option in fields(TrainSettings))
_TRUTH = frozenset(
    ["yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"]
)  # values of booleans in transformers' parser
_MOST_WORKERS = 16  # processes of a data loader per CPU core

# Packages of a tracker, of which it needs one. transformers checks trackers that are not listed.
_TRACKER_PACKAGES = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def check_training_args(given: Mapping[str, str]) -> None:
    """Check the names, and the types of values against the source of SFTConfig.

    Raises:
        InputError: A name is unknown or reserved, or a value has the wrong type or a secret.
    """
    declared = sft_config_fields() if given else {}
    for name, value in given.items():
        check_name(name)
        if declared and name not in declared:
            raise unknown_name(name, declared)
        _check_value(name, value, declared.get(name, frozenset()) - {"None"})
        _check_secrets(name, value)


def check_name(name: str) -> None:
    """Reject a reserved argument.

    Raises:
        InputError: The run sets it, it has an option of molf, or it needs a package.
    """
    if name in _CONTROLLED:
        raise InputError(f"training_args.{name} cannot be set: a run decides it itself.")
    if name in _WITHOUT_EFFECT:
        raise InputError(
            f"training_args.{name} cannot be set: it would have no effect. molf prepares the data, "
            "evaluates and saves itself."
        )
    if name in _IMPOSSIBLE:
        raise InputError(f"training_args.{name} cannot be set: {_IMPOSSIBLE[name]}.")
    if name.startswith("hub_"):
        raise InputError(
            f"training_args.{name} cannot be set: a run pushes nothing. Upload the model with "
            "molf push."
        )
    if name == "use_liger_kernel" and find_spec("liger_kernel") is None:
        raise InputError(
            "training_args.use_liger_kernel needs liger-kernel, which is not installed."
        )
    if name in _OPTIONS:
        raise InputError(f"training_args.{name} is an option of its own: give --{name}.")


def unknown_name(name: str, known: Iterable[str]) -> InputError:
    """Return the error for an argument that SFTConfig lacks, with a suggestion."""
    fields = {field for field in known if not field.startswith("hub_")} - _REFUSED - _OPTIONS
    hint = suggestion(name, fields | {f"--{option}" for option in _OPTIONS})
    return InputError(f"training_args.{name} is no argument of TRL's SFTConfig.{hint}")


def _check_secrets(name: str, value: str) -> None:
    """Reject an argument that contains a secret."""
    # The trainer writes its arguments to checkpoints and trackers unmasked.
    if mask_text(value) != value:
        raise InputError(
            f"training_args.{name} holds a secret, or an address with a query or a user, which "
            "checkpoints and trackers would record. Give it by the environment variable that "
            "its library reads, or leave it out."
        )


def _check_value(name: str, value: str, types: frozenset[str]) -> None:
    """Reject a text that does not fit the declared type, if only one is declared."""
    fault = None
    if types == {"int"}:
        fault = _whole_number_fault(value)
    elif types == {"float"}:
        fault = _number_fault(value)
    elif types == {"bool"} and value.lower() not in _TRUTH:
        fault = "must be true or false"
    elif value.startswith("{") and any(kind.startswith("dict") for kind in types):
        fault = _json_fault(value)
    if fault is None and name == "neftune_noise_alpha" and float(value) < 0:
        fault = "must be at least 0"
    if fault is None and name == "dataloader_num_workers":
        fault = _workers_fault(int(value))
    if fault is not None:
        raise InputError(f"training_args.{name}={value!r} {fault}.")


def _whole_number_fault(value: str) -> str | None:
    if is_too_large(value):
        return TOO_LARGE
    try:
        int(value)
    except ValueError:
        return "must be a whole number"
    return None


def _number_fault(value: str) -> str | None:
    try:
        return None if math.isfinite(float(value)) else "must be finite"
    except ValueError:
        return "must be a number"


def _json_fault(value: str) -> str | None:
    try:
        json.loads(value)
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    return None


def _workers_fault(workers: int) -> str | None:
    """Return why a number of data loader workers is not allowed; None if it is."""
    # Each worker is a process, and all are started before the first step.
    most = _MOST_WORKERS * (os.cpu_count() or 1)
    if 0 <= workers <= most:
        return None
    return f"must be from 0 to {most}, {_MOST_WORKERS} processes for each CPU core"


def check_trackers(names: tuple[str, ...], *, must_be_installed: bool = True) -> None:
    """Check `--report_to`.

    Args:
        names: The given trackers.
        must_be_installed: Whether the tracker will be used in this environment.

    Raises:
        InputError: transformers has no such tracker, or it is not installed.
    """
    given = [name for name in names if name not in ("none", "all")]
    known = _known_trackers() if given else frozenset()
    for name in given:
        if known and name not in known:
            raise InputError(
                f"report_to={name} is no tracker of the trainer: {', '.join(sorted(known))}; all, "
                f"none.{suggestion(name, known)}"
            )
        packages = _TRACKER_PACKAGES.get(name, ())
        if must_be_installed and packages and not any(map(find_spec, packages)):
            installed = [
                other for other, needed in _TRACKER_PACKAGES.items() if any(map(find_spec, needed))
            ]
            raise InputError(
                f"report_to={name} needs {packages[0]}, which is not installed. Available here: "
                f"{', '.join(['none', *installed])}."
            )


@cache
def _known_trackers() -> frozenset[str]:
    """Return the names in transformers' table of trackers; empty if the table is not found."""
    folder = package_folder("transformers")
    if folder is None:
        return frozenset()
    try:
        text = (folder / "integrations" / "integration_utils.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return frozenset()
    table = re.search(r"^INTEGRATION_TO_CALLBACK = \{(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r'^\s*"(\w+)":', table[1], re.MULTILINE)) if table else frozenset()
