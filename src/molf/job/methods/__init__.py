"""The training methods, one file each: changes to the model, and the optimizer."""

from __future__ import annotations

from typing import Any

from molf.job.methods.adalora import AdaLora
from molf.job.methods.base import Method, Plan, Prepared, TrainingData
from molf.job.methods.dora import Dora
from molf.job.methods.eva import Eva
from molf.job.methods.fft import FullFineTuning
from molf.job.methods.hybrid import Hybrid, assigned
from molf.job.methods.lora import Lora
from molf.job.methods.lora_plus import LoraPlus
from molf.job.methods.molf import Molf
from molf.job.methods.molf_e import MolfEfficient
from molf.job.methods.pissa import Pissa
from molf.job.settings.resolved import ResolvedSettings
from molf.planning.trainable import freeze

__all__ = ["Plan", "Prepared", "TrainingData", "assigned", "check", "plan", "prepare"]

# The keys are those of `defaults.METHODS`.
_METHODS: dict[str, Method] = {
    "fft": FullFineTuning(),
    "lora": Lora(),
    "lora+": LoraPlus(),
    "dora": Dora(),
    "pissa": Pissa(),
    "eva": Eva(),
    "adalora": AdaLora(),
    "molf": Molf(),
    "molf-e": MolfEfficient(),
    "hybrid": Hybrid(),
}


def check(skeleton: Any, settings: ResolvedSettings) -> None:
    """Check on a model without weights that the method can train it.

    Args:
        skeleton: The model on the meta device; it is not usable afterwards.
        settings: The run's settings.

    Raises:
        InputError: A pattern matches nothing, no layer is left, or a layer cannot be adapted.
    """
    _METHODS[settings.method].check(skeleton, settings)


def plan(model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
    """Return the plan of the method; modules that text does not reach are frozen.

    Raises:
        InputError: The settings do not fit the model or the data.
    """
    freeze(model, settings.unreached)  # without a gradient: neither counted nor given state
    return _METHODS[settings.method].plan(model, settings, data)


def prepare(model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
    """Prepare a model for training with `settings.method`, in place.

    Random initialisation depends on `settings.seed` only.
    """
    freeze(model, settings.unreached)
    return _METHODS[settings.method].prepare(model, settings, data)
