"""The settings with all defaults that depend on the method, the task and the time."""

from __future__ import annotations

import secrets
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from molf.core.assignment.assignment import Assignment
from molf.core.config import MoLFConfig
from molf.data.sources import OPTIONS as SOURCES
from molf.data.sources import absolute_sources
from molf.errors import InputError
from molf.job.settings.defaults import ADAPTERS, MERGE_BASES, QUANTISABLE, STORAGE, defaults_for
from molf.job.settings.during import BY_LOSS, eval_strategy_of
from molf.job.settings.settings import SAVE_MINUTES, TrainSettings
from molf.paths import absolute, check_path, settled

KEPT_CHECKPOINTS = 2  # a damaged newest one leaves the one before it


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(TrainSettings):
    """The settings with all defaults set.

    Attributes:
        unreached: Modules that text input does not use, which are left out; set once the model is
            loaded.
        bypassed: Layers that the model uses without calling them, so that an adapter has no effect.
        assigned: The assignment of method hybrid, with `freeze_rest` and `use_rslora` of these
            settings; set once the model's layers are known.
    """

    model: str
    learning_rate: float
    lora_learning_rate: float
    num_train_epochs: float
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    output_dir: Path
    save_minutes: float
    unreached: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    assigned: Assignment | None = None

    @property
    def method_config(self) -> MoLFConfig | None:
        """The experts or the adapter, without the layers that these cannot train."""
        config = super().method_config
        if config is None:
            return None
        return config.without((*self.unreached, *(self.bypassed if self.has_adapter else ())))

    @property
    def has_adapter(self) -> bool:
        """Whether the trained model has a PEFT adapter."""
        has_lora = self.assigned is not None and bool(self.assigned.lora)
        return self.method in (*ADAPTERS, "molf-e") or self.is_explicit or has_lora

    @property
    def reached_assignment(self) -> Assignment | None:
        """The assignment with layers frozen that text does not reach, or no adapter changes."""
        if self.assigned is None:
            return None
        reached = self.assigned.without(self.unreached)
        adapted = {layer.name for layer in reached.lora}
        return reached.without(name for name in self.bypassed if name in adapted)

    @property
    def trains_dense(self) -> bool:
        """Whether parameters other than LoRA factors are trained, which use `learning_rate`."""
        if self.assigned is not None:
            return bool(self.assigned.full) or not self.assigned.freeze_rest
        return super().trains_dense

    @property
    def is_explicit(self) -> bool:
        """Whether MoLF's experts are an adapter beside trained weights, which dropout needs."""
        config = super().method_config
        return self.method == "molf" and config is not None and config.lora_dropout > 0

    @property
    def has_checkpoints(self) -> bool:
        """Whether the training writes checkpoints."""
        return self.save_steps is not None or self.save_minutes > 0 or self.keep_best

    @property
    def keeps_models(self) -> bool:
        """Whether a checkpoint also holds the model in the format of transformers or PEFT."""
        # Only one that stays in the run. A model cannot be written in the background, nor by one
        # process that has a part of it.
        return self.save_steps is not None and not self.async_save and self.fsdp is None

    @property
    def kept_checkpoints(self) -> int | None:
        """The number of checkpoints that remain during the training; None for all."""
        if self.save_total_limit is None and self.save_steps is None:
            return KEPT_CHECKPOINTS
        return self.save_total_limit

    @property
    def most_checkpoints(self) -> int | None:
        """The number of checkpoints that remain, with that of the best step; None for all."""
        kept = self.kept_checkpoints
        return None if kept is None else kept + self.keep_best

    def as_options(self) -> dict[str, Any]:
        """Return the settings as plain values: a recipe that `molf train --config` accepts."""
        options = asdict(self)
        for name in ("unreached", "bypassed", "assigned"):  # each run finds them in its model
            del options[name]
        for name, value in options.items():
            if isinstance(value, Path):
                options[name] = str(value)
            elif isinstance(value, tuple):
                options[name] = list(value)
        return options


def resolve(settings: TrainSettings, now: datetime) -> ResolvedSettings:
    """Set every default that depends on the method, the task or the time.

    Raises:
        InputError: The task needs an option that was not given.

    Warns:
        UserWarning: Options without effect were given, or several ranks for one adapter.
    """
    _warn_of_unused(settings)
    _warn_of_ranks(settings)
    given = {name: value for name, value in vars(settings).items() if value is not None}
    values = {**defaults_for(settings.method, settings.task), **given}
    _set_method(values, settings)
    _set_rates(values, settings)
    _set_batches(values, settings)
    if eval_strategy_of(settings) == "steps":
        values["eval_strategy"] = "steps"
        values["eval_steps"] = settings.eval_steps or settings.logging_steps
    values.setdefault("save_minutes", SAVE_MINUTES if settings.save_steps is None else 0.0)
    _set_places(values, settings, now)
    return ResolvedSettings(**values)


def _set_method(values: dict[str, Any], settings: TrainSettings) -> None:
    """Set options of the method's experts and of their storage."""
    # The record has the defaults of unused options, so that it does not warn as a recipe.
    values |= {name: _DEFAULTS[name] for name in unused_options(settings)}
    if settings.quantised is not None and settings.merge_base is None:
        values["merge_base"] = MERGE_BASES[0]
    config = settings.method_config
    if config is not None:
        values |= {"ranks": config.ranks, "alpha": config.alphas, "use_rslora": config.use_rslora}
    is_rounded = settings.dtype == "bfloat16" and "weight_rounding" not in _UNUSED[settings.method]
    if is_rounded and settings.weight_rounding is None:
        values["weight_rounding"] = "exact"  # the optimizers' default for bfloat16, for the record


def _set_rates(values: dict[str, Any], settings: TrainSettings) -> None:
    """Set the learning rate of the LoRA factors."""
    # A demo task's LoRA rate belongs to its learning rate, which the user has replaced.
    is_replaced = settings.lora_learning_rate is None and settings.learning_rate is not None
    if is_replaced or values.get("lora_learning_rate") is None:
        values["lora_learning_rate"] = values["learning_rate"]


def _set_batches(values: dict[str, Any], settings: TrainSettings) -> None:
    """Set the examples of a step, and the clipping of its gradients."""
    if settings.packing and not settings.optimizer_in_backward:
        _pack_one_by_one(values, settings)
    if "optimizer_in_backward" in _UNUSED[settings.method] or not settings.optimizer_in_backward:
        values.setdefault("max_grad_norm", 1.0)
    else:
        _use_in_backward(values)
    size = values["per_device_train_batch_size"]
    if settings.padding_free and size == 1 and not settings.packing:
        warnings.warn(
            f"Without effect with per_device_train_batch_size={size}: padding_free.", stacklevel=3
        )


def _set_places(values: dict[str, Any], settings: TrainSettings, now: datetime) -> None:
    """Set model, data and directories; the record must be valid from any working directory."""
    values["model"] = settings.model or _task_model(settings.task)
    if settings.output_dir is None:
        values["output_dir"] = _fresh_directory(settings, values["model"], now)
    else:
        check_path(settings.output_dir, "output_dir")
        values["output_dir"] = settled(settings.output_dir)
    for name in ("fallback_dir", "token_cache"):
        if (folder := getattr(settings, name)) is not None:
            check_path(folder, name)
            values[name] = settled(folder).absolute()
    for name in ("model", "forgetting_data", "assignment"):
        if values.get(name) is not None:
            values[name] = absolute(values[name])
    for name in SOURCES:
        if values.get(name) is not None:
            values[name] = absolute_sources(values[name], name)


_DEFAULTS = {
    option.name: option.default
    for option in fields(TrainSettings)
    if option.name != "training_args"
}
_ROUTING = ("score", "top_k", "freeze_rest")
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
_ASSIGNED = ("assignment", "use_dora")
_UNUSED = {
    "fft": (*_ADAPTER, "match", "loraplus_lr_ratio", *_ROUTING, *_ASSIGNED),
    "molf": ("match", "loraplus_lr_ratio", *_ASSIGNED),
    # PEFT's factors are float32.
    "molf-e": ("match", "loraplus_lr_ratio", "weight_rounding", *_ASSIGNED),
    **dict.fromkeys(
        ADAPTERS, ("weight_decay", "loraplus_lr_ratio", *_ROUTING, *STORAGE, *_ASSIGNED)
    ),
    "lora+": ("weight_decay", *_ROUTING, *STORAGE, *_ASSIGNED),
    "hybrid": (
        *("ranks", "alpha", "target_modules", "exclude_modules"),  # the assignment has them
        *("match", "loraplus_lr_ratio", "score", "top_k"),
    ),
}


def without_effect(method: str) -> tuple[str, ...]:
    """Return the options that a method never uses."""
    return _UNUSED.get(method, ())


def unused_options(settings: TrainSettings) -> tuple[str, ...]:
    """Return the names of the options that have no effect with these settings."""
    unused = _UNUSED[settings.method]
    if settings.method == "molf-e" and settings.freeze_rest is not False:
        # The adapter is float32, and so are its gradients and moments.
        unused = ("weight_decay", "state_dtype", "grad_accumulation_dtype", *unused)
    if settings.method not in QUANTISABLE:
        unused = (*unused, "merge_base")
    return unused


def _pack_one_by_one(values: dict[str, Any], settings: TrainSettings) -> None:
    """Take one packed row per forward pass by default, and as many rows per step as before."""
    # Attention over the rows of a pass, joined to one, takes the square of their number.
    if settings.per_device_train_batch_size is None:
        size = values["per_device_train_batch_size"]
        values["per_device_train_batch_size"] = 1
        if settings.gradient_accumulation_steps is None:
            values["gradient_accumulation_steps"] *= size


def _use_in_backward(values: dict[str, Any]) -> None:
    """Turn off clipping and accumulation, which steps in the backward pass exclude."""
    # Both are only defaults here; given by the user, they are errors.
    values["max_grad_norm"] = 0.0
    steps = values["gradient_accumulation_steps"]
    if steps > 1:
        batch = values["per_device_train_batch_size"]
        unit = "packed rows" if values["packing"] else "examples"
        warnings.warn(
            f"optimizer_in_backward accumulates no gradients: a step has {batch} {unit} instead "
            f"of {batch * steps}. Raise per_device_train_batch_size if that fits.",
            stacklevel=4,
        )
        values["gradient_accumulation_steps"] = 1


def _warn_of_unused(settings: TrainSettings) -> None:
    unused = [
        name for name in unused_options(settings) if getattr(settings, name) != _DEFAULTS[name]
    ]
    if unused:
        warnings.warn(
            f"Without effect with method={settings.method}: {', '.join(unused)}.", stacklevel=3
        )
    warmup, schedule = settings.warmup_ratio, settings.lr_scheduler_type
    if schedule in ("constant", *BY_LOSS) and warmup not in (0, _DEFAULTS["warmup_ratio"]):
        instead = " Give constant_with_warmup." if schedule == "constant" else ""
        warnings.warn(
            f"Without effect with lr_scheduler_type={schedule}: warmup_ratio={warmup:g}.{instead}",
            stacklevel=3,
        )
    if settings.save_minutes == 0 and settings.save_steps is None and not settings.keep_best:
        saving = ("save_total_limit", "async_save", "on_save_error")
        given = [name for name in saving if getattr(settings, name) != _DEFAULTS[name]]
        if given:
            warnings.warn(f"Without effect without checkpoints: {', '.join(given)}.", stacklevel=3)
    limit = settings.max_skipped_steps
    if settings.nonfinite == "raise" and limit != _DEFAULTS["max_skipped_steps"]:
        warnings.warn(
            f"Without effect with nonfinite=raise: max_skipped_steps={limit}. Give --nonfinite "
            "skip to have steps skipped.",
            stacklevel=3,
        )


def _warn_of_ranks(settings: TrainSettings) -> None:
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
    """Return a directory name that is unique, also among runs that start in the same second."""
    name = f"{settings.task}-{settings.method}-{Path(model).name}-{now:%Y%m%d-%H%M%S}"
    return Path("runs") / f"{name}-{secrets.token_hex(3)}"
