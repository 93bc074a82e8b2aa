"""Find changes that make a training fit a device, each with its planned peak."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

from molf.core.config import MoLFConfig
from molf.core.options import OptimizerOptions
from molf.errors import InputError
from molf.planning.devices import Device
from molf.planning.memory import Planner
from molf.planning.workload import QUANTISABLE, QUANTISATIONS, Workload

_LEAST_LENGTH = 128
MOST_GPUS = 64

# Yields values of an option, each with lower memory than the last: its text on the command line,
# and the workload with it.
_Option = Callable[[Workload], Iterator[tuple[str, Workload]]]


@dataclass(frozen=True)
class Suggestion:
    """One or more changes with which the training fits.

    Attributes:
        changes: The options for `molf plan`.
        workload: The changed training.
        peak: Its planned peak in bytes.
    """

    changes: tuple[str, ...]
    workload: Workload
    peak: int


def suggestions(
    planner: Planner,
    workload: Workload,
    device: Device,
    frozen_base: Mapping[str, MoLFConfig],
) -> list[Suggestion]:
    """Find changes that make a training fit a device.

    Each option is tried alone, and its first value that fits is suggested.

    Args:
        planner: Of the model.
        workload: A training that does not fit.
        device: The device.
        frozen_base: Methods that freeze the base, each with its adapter.

    Returns:
        The suggestions; empty if no tried change is enough.
    """
    # Where no single option is enough, the changes of _CHEAP are made one after the other, and
    # each option is tried again on top of them.
    granted: tuple[str, ...] = ()
    methods = [_with_method(method, config) for method, config in frozen_base.items()]
    # Other methods and more GPUs come last: they change the result or the cost.
    options = (*_OPTIONS, *methods, _gpus)
    # None: first without a granted change.
    for option in (None, *_CHEAP):
        if option is not None:
            further = _values(option, workload)
            if not further:
                continue  # set already, or excluded
            # The last value of an option saves the most.
            text, workload = further[-1]
            granted = (*granted, text)
        tried = (_first_that_fits(planner, workload, device, option) for option in options)
        found = [replace(s, changes=(*granted, *s.changes)) for s in tried if s is not None]
        if found:
            return found
    return []


def _values(option: _Option, workload: Workload) -> list[tuple[str, Workload]]:
    """Return the values of an option that the workload's other options do not exclude."""
    found: list[tuple[str, Workload]] = []
    with suppress(InputError):
        found.extend(option(workload))
    return found


def _first_that_fits(
    planner: Planner, workload: Workload, device: Device, option: _Option
) -> Suggestion | None:
    """Return the first value of an option that fits; each value takes less than the last."""
    values = _values(option, workload)
    peaks = [cache(partial(_peak_below, planner, changed, device)) for _, changed in values]
    # Bisection, because a plan takes seconds, and a batch of a million has twenty values.
    first = bisect_left(peaks, True, key=lambda peak: peak() is not None)
    if first == len(values) or (peak := peaks[first]()) is None:
        return None
    text, changed = values[first]
    return Suggestion((text,), changed, peak)


def _peak_below(planner: Planner, workload: Workload, device: Device) -> int | None:
    """Return the planned peak if it fits, else None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user has not chosen these settings
        try:
            # The step is traced first: it is faster, and often too large alone.
            if not device.fits(planner.step_peak(workload)):
                return None
            peak = planner.memory(workload).peak
        except InputError:  # the method does not support this model's layers
            return None
    return peak if device.fits(peak) else None


def _checkpointing(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if not workload.checkpointing:
        yield "--gradient_checkpointing", replace(workload, checkpointing=True)


def _batch_size(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Halve the batch repeatedly; accumulation keeps the number of examples per step."""
    size = workload.batch_size
    while size > 1:
        size //= 2
        yield (
            f"--per_device_train_batch_size {size}",
            replace(
                workload,
                batch_size=size,
                accumulates=not workload.optimizer_in_backward,
                padded=size > 1,
            ),
        )


def _length(workload: Workload) -> Iterator[tuple[str, Workload]]:
    length = workload.length // 2
    while length >= _LEAST_LENGTH:
        yield f"--max_length {length}", replace(workload, length=length)
        length //= 2


def _states(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if workload.trains_dense and workload.state_dtype != "8bit" and find_spec("torchao"):
        yield "--state_dtype 8bit", replace(workload, state_dtype="8bit")


def _dtype(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if workload.dtype != "bfloat16" and workload.quantised is None:
        yield "--dtype bfloat16", replace(workload, dtype="bfloat16")


def _rounding(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Use bfloat16 weights without their lower halves."""
    if workload.trains_dense and workload.weight_rounding in (None, "exact"):
        text = "--weight_rounding stochastic"
        changed = replace(workload, dtype="bfloat16", weight_rounding="stochastic")
        yield text if workload.dtype == "bfloat16" else f"--dtype bfloat16 {text}", changed


def _in_backward(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Step in the backward pass, and without accumulation, which it excludes."""
    if workload.trains_dense and not workload.optimizer_in_backward and workload.devices == 1:
        changed = replace(
            workload, optimizer_in_backward=True, accumulates=False, grad_accumulation_dtype=None
        )
        extra = " --gradient_accumulation_steps 1" if workload.accumulates else ""
        yield f"--optimizer_in_backward{extra}", changed


def _offload(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Keep the optimizer's state in host memory, or the whole shards of several devices."""
    if workload.devices > 1:
        if workload.device == "cuda" and not workload.cpu_offload:
            text = "--fsdp_cpu_offload" if workload.shards else "--fsdp all --fsdp_cpu_offload"
            yield text, replace(workload, cpu_offload=True)
        return
    changed = replace(workload, state_offload=True)
    if workload.trains_dense and changed.offloads and not workload.offloads:
        yield "--state_offload", changed


def _quantised(workload: Workload) -> Iterator[tuple[str, Workload]]:
    if workload.method == "hybrid" and workload.has_adapter and workload.quantised is None:
        if not workload.use_dora:
            for option in QUANTISATIONS[::-1]:
                yield f"--{option}", replace(workload, quantised=option)
    elif workload.method in QUANTISABLE and workload.quantised is None:
        dtype = "" if workload.dtype == "float32" else " --dtype float32"
        for option in QUANTISATIONS[::-1]:
            changed = replace(workload, quantised=option, dtype="float32", weight_rounding=None)
            yield f"--{option}{dtype}", changed


def _with_method(method: str, config: MoLFConfig) -> _Option:
    """A method that freezes the base; beside a quantised base if need be."""

    def change(workload: Workload) -> Iterator[tuple[str, Workload]]:
        if workload.method in ("fft", "molf"):
            # Options of storage are for trained base weights.
            changed = replace(
                workload, method=method, config=config, **OptimizerOptions().as_keywords()
            )
            yield f"--method {method}", changed
            for text, quantised in _quantised(changed):
                yield f"--method {method} {text}", quantised

    return change


def _gpus(workload: Workload) -> Iterator[tuple[str, Workload]]:
    count = 2 * workload.num_gpus
    while count * workload.num_nodes <= MOST_GPUS and not workload.steps_in_backward:
        yield f"--num_gpus {count}", replace(workload, num_gpus=count)
        count *= 2


_CHEAP: tuple[_Option, ...] = (
    _checkpointing,
    _batch_size,
    _states,
    _dtype,
    _in_backward,
    _rounding,
    _offload,
)
# First options that change only the time, then the storage types, then the trained parameters.
_OPTIONS: tuple[_Option, ...] = (
    _checkpointing,
    _batch_size,
    _in_backward,
    _states,
    _dtype,
    _rounding,
    _offload,
    _length,
    _quantised,
)
