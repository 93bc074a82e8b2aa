"""What would make a training fit a device: changes of the plan, each with its own planned peak."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from molf.errors import InputError
from molf.plan.devices import Device
from molf.plan.memory import Planner
from molf.plan.workload import Workload, method_config

_LEAST_LENGTH = 128
_MOST_GPUS = 64

_Option = Callable[[Workload], Iterator[tuple[str, Workload]]]
"""An option's further and further values: how to give each, and the training with it."""


@dataclass(frozen=True)
class Suggestion:
    """A change, or several together, after which the training fits.

    Attributes:
        changes: What to give to `molf plan`, option by option.
        workload: The changed training.
        peak: Its planned peak in bytes.
    """

    changes: tuple[str, ...]
    workload: Workload
    peak: int


def suggestions(planner: Planner, workload: Workload, device: Device) -> list[Suggestion]:
    """Find changes that make a training fit a device.

    Every option is tried alone, and the first value of each that fits is suggested. Where none
    does, what costs least is taken for granted (checkpointing, then a batch of one, then bfloat16
    weights) and the others are tried on top.

    Args:
        planner: Of the model.
        workload: A training that does not fit.
        device: The device.

    Returns:
        The suggestions; empty if nothing that was tried is enough.
    """
    granted: tuple[str, ...] = ()
    for option in (None, _checkpointing, _batch_size, _dtype):
        if option is not None:
            further = list(option(workload))
            if not further:
                continue  # it is so already
            text, workload = further[-1]
            granted = (*granted, text)
        tried = (_first_that_fits(planner, workload, device, option) for option in _OPTIONS)
        found = [replace(s, changes=(*granted, *s.changes)) for s in tried if s is not None]
        if found:
            return found
    return []


def _first_that_fits(
    planner: Planner, workload: Workload, device: Device, option: _Option
) -> Suggestion | None:
    for text, changed in option(workload):
        peak = _peak_below(planner, changed, device)
        if peak is not None:
            return Suggestion((text,), changed, peak)
    return None


def _peak_below(planner: Planner, workload: Workload, device: Device) -> int | None:
    """The planned peak if it fits; the pass need not be traced where the step alone does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubtful settings that nobody has chosen yet
        try:
            if not device.fits(planner.step_peak(workload)):
                return None
            peak = planner.memory(workload).peak
        except InputError:  # a method that does not go with this model's layers
            return None
    return peak if device.fits(peak) else None


def _checkpointing(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if not workload.checkpointing:
        yield "--gradient_checkpointing", replace(workload, checkpointing=True)


def _batch_size(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Half the batch and half again; the examples of a step are kept by accumulation."""
    size = workload.batch_size
    while size > 1:
        size //= 2
        yield (
            f"--per_device_train_batch_size {size}",
            replace(workload, batch_size=size, accumulates=True, padded=size > 1),
        )


def _length(workload: Workload) -> Iterator[tuple[str, Workload]]:
    length = workload.length // 2
    while length >= _LEAST_LENGTH:
        yield f"--max_length {length}", replace(workload, length=length)
        length //= 2


def _dtype(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if workload.dtype != "bfloat16":
        yield "--dtype bfloat16", replace(workload, dtype="bfloat16")


def _frozen_base(method: str) -> _Option:
    """The method with its default ranks, on the same layers."""

    def change(workload: Workload) -> Iterator[tuple[str, Workload]]:
        if workload.method in ("fft", "molf"):
            config = workload.config
            modules = ("target_modules", "exclude_modules")
            same = {name: getattr(config, name) for name in modules} if config else {}
            yield (
                f"--method {method}",
                replace(workload, method=method, config=method_config(method, **same)),
            )

    return change


def _gpus(workload: Workload) -> Iterator[tuple[str, Workload]]:
    count = 2 * workload.num_gpus
    while count <= _MOST_GPUS:
        yield f"--num_gpus {count}", replace(workload, num_gpus=count)
        count *= 2


# Those that change nothing but time come first.
_OPTIONS: tuple[_Option, ...] = (
    _checkpointing,
    _batch_size,
    _length,
    _dtype,
    _frozen_base("molf-e"),
    _frozen_base("lora"),
    _gpus,
)
