"""The settings of a run, from its `config.yaml`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from molf.errors import InputError
from molf.job.record.finished_run import FinishedRun
from molf.job.settings.resolved import ResolvedSettings

# Every run has a value of these; `TrainSettings` has None for the default by method and task.
_REQUIRED = (
    "model",
    "learning_rate",
    "lora_learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "output_dir",
)


def settings_of(run: FinishedRun) -> ResolvedSettings:
    """Return the settings that a run was started with.

    Raises:
        InputError: Its `config.yaml` lacks one of them, or has a value that is not allowed.
    """
    known = {option.name for option in fields(ResolvedSettings)}
    values: dict[str, Any] = {}
    for name, value in run.config.items():
        if name in known and value is not None:
            is_path = name in ("output_dir", "fallback_dir", "token_cache")
            values[name] = tuple(value) if isinstance(value, list) else value
            values[name] = Path(value) if is_path else values[name]
    if missing := [name for name in _REQUIRED if name not in values]:
        raise InputError(f"{run.path}: its config.yaml lacks {', '.join(missing)}.")
    left_out = (run.config["run"].get("model") or {}).get("not_reached") or ()
    try:
        return ResolvedSettings(**{**values, "unreached": tuple(left_out)})
    except (TypeError, ValueError) as error:
        raise InputError(f"{run.path}: its config.yaml is wrong: {error}") from error
