"""The settings once what depends on the method, the task and the time is filled in."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from molf.errors import InputError
from molf.train.defaults import ADAPTERS, defaults_for
from molf.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(TrainSettings):
    """The settings with no such default left open."""

    model: str
    learning_rate: float
    lora_learning_rate: float
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    output_dir: Path

    def as_options(self) -> dict[str, Any]:
        """Return the settings as plain values: a recipe that `molf train --config` accepts."""
        options = asdict(self)
        for name, value in options.items():
            if isinstance(value, Path):
                options[name] = str(value)
            elif isinstance(value, tuple):
                options[name] = list(value)
        return options


def resolve(settings: TrainSettings, now: datetime) -> ResolvedSettings:
    """Fill in every default that depends on the method, the task or the time.

    Raises:
        InputError: The task needs an option that was not given.

    Warns:
        UserWarning: Options that do nothing with this method were given, or several ranks for one
            adapter.
    """
    _warn_of_unused(settings)
    _warn_of_summed_ranks(settings)
    given = {name: value for name, value in vars(settings).items() if value is not None}
    values = {**defaults_for(settings.method, settings.task), **given}
    for name in _UNUSED[settings.method]:
        values[name] = _DEFAULTS[name]
    config = settings.method_config
    if config is not None:
        values |= {"ranks": config.ranks, "alpha": config.alphas, "use_rslora": config.use_rslora}
    if settings.lora_learning_rate is None and settings.learning_rate is not None:
        values["lora_learning_rate"] = None  # a task's own rate goes with the task's other rate
    if values.get("lora_learning_rate") is None:
        values["lora_learning_rate"] = values["learning_rate"]
    values["model"] = settings.model or _task_model(settings.task)
    if settings.output_dir is None:
        values["output_dir"] = _fresh_directory(settings, values["model"], now)
    else:  # the shell expands ~, recipes and quoted options do not
        values["output_dir"] = settings.output_dir.expanduser()
    for name in ("data", "eval_data", "forgetting_data"):
        if (values.get(name) or "").startswith("~"):
            values[name] = str(Path(values[name]).expanduser())
    return ResolvedSettings(**values)


_DEFAULTS = {
    option.name: option.default
    for option in fields(TrainSettings)
    if option.name != "training_args"
}
_ROUTING = ("score", "top_k", "freeze_rest", "nonfinite")
_ADAPTER = (
    "ranks",
    "alpha",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "lora_learning_rate",
    "lora_weight_decay",
)
_UNUSED = {
    "fft": (*_ADAPTER, "match", "loraplus_lr_ratio", *_ROUTING),
    "molf": ("match", "loraplus_lr_ratio"),
    **dict.fromkeys(ADAPTERS, ("weight_decay", "loraplus_lr_ratio", *_ROUTING)),
    "lora+": ("weight_decay", *_ROUTING),
}


def _warn_of_unused(settings: TrainSettings) -> None:
    unused = [
        name for name in _UNUSED[settings.method] if getattr(settings, name) != _DEFAULTS[name]
    ]
    if unused:
        warnings.warn(
            f"Without effect with method={settings.method}: {', '.join(unused)}.", stacklevel=3
        )


def _warn_of_summed_ranks(settings: TrainSettings) -> None:
    config = settings.method_config
    if settings.method in ADAPTERS and config and len(settings.ranks or ()) > 1:
        given = ",".join(map(str, settings.ranks or ()))
        warnings.warn(
            f"method={settings.method} trains one adapter: ranks={given} give it their sum, "
            f"{config.ranks[0]}.",
            stacklevel=3,
        )


def _task_model(task: str) -> str:
    if not task.startswith("demo-"):
        raise InputError(
            f"task={task} needs --model: a local directory in transformers format, or a Hub id."
        )
    from molf.world import BASE_PATH

    return str(BASE_PATH)


def _fresh_directory(settings: TrainSettings, model: str, now: datetime) -> Path:
    """A directory name that no earlier run has taken."""
    name = f"{settings.task}-{settings.method}-{Path(model).name}-{now:%Y%m%d-%H%M%S}"
    path = Path("runs") / name
    attempt = 1
    while path.exists():
        attempt += 1
        path = Path("runs") / f"{name}-{attempt}"
    return path
