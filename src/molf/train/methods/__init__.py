"""The ways to train, a file for each: what happens to the model, and which optimizer drives it."""

from __future__ import annotations

from typing import Any

from molf.train.methods.adalora import AdaLora
from molf.train.methods.base import Method, Plan, Prepared, TrainingData
from molf.train.methods.dora import Dora
from molf.train.methods.eva import Eva
from molf.train.methods.fft import FullFineTuning
from molf.train.methods.lora import Lora
from molf.train.methods.lora_plus import LoraPlus
from molf.train.methods.molf import Molf
from molf.train.methods.molf_e import MolfEfficient
from molf.train.methods.pissa import Pissa
from molf.train.resolved import ResolvedSettings

__all__ = ["Plan", "Prepared", "TrainingData", "check", "plan", "prepare"]

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
}


def check(skeleton: Any, settings: ResolvedSettings) -> None:
    """Find out on a model without weights whether the method can train it.

    Args:
        skeleton: The model on the meta device. It is used up: an adapter may be put into it.
        settings: The run's settings.

    Raises:
        InputError: A pattern matches nothing, no layer is left, or a layer cannot be adapted.
    """
    _METHODS[settings.method].check(skeleton, settings)


def plan(model: Any, settings: ResolvedSettings, data: TrainingData) -> Plan:
    """Say what will be trained; nothing changes but that what no text reaches is frozen.

    Raises:
        InputError: The settings do not fit the model or the data.
    """
    _freeze_unreached(model, settings)
    return _METHODS[settings.method].plan(model, settings, data)


def prepare(model: Any, settings: ResolvedSettings, data: TrainingData) -> Prepared:
    """Make a model ready to be trained with `settings.method`; it is changed in place.

    Its weights are float32, or quantised where the settings say so.

    Random initialisation depends on `settings.seed` alone.
    """
    _freeze_unreached(model, settings)
    return _METHODS[settings.method].prepare(model, settings, data)


def _freeze_unreached(model: Any, settings: ResolvedSettings) -> None:
    """Freeze modules that would get no gradient, so that nothing counts or keeps state for them."""
    for name in settings.unreached:
        model.get_submodule(name).requires_grad_(False)
