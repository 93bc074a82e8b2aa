"""Send a run's options, metrics and the picture of its routing to the trackers of `report_to`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.errors import reason_of
from molf.job.failing import NotStartedError
from molf.job.record.routing_log import RoutingWriter
from molf.job.trainer.routing_image import routing_image
from molf.job.trainer.trackers import KINDS, Tracker
from molf.masking import mask
from molf.measure import Evaluation

TAG = "routing/winners"
FOLDER = "runs"
"""Folder of TensorBoard's files in `checkpoints/`."""


class Tracking:
    """The trackers' runs of one training.

    Args:
        trackers: By their names in `report_to`; empty in all processes but rank 0.
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = trackers

    def open(self, stored: Mapping[str, str]) -> dict[str, str]:
        """Open all, and return what opens them again.

        Args:
            stored: The result of an earlier part of the training; empty for a new one.

        Raises:
            NotStartedError: A tracker cannot be opened, for example without a login.
        """
        opened: dict[str, str] = {}
        for name, one in self._trackers.items():
            try:
                opened[name] = one.open(stored.get(name))
            except Exception as error:  # of any library
                raise NotStartedError(f"report_to={name}: {reason_of(error)}") from error
        return opened

    def attach(self, callbacks: list[Any]) -> None:
        """Make transformers' callbacks use these runs."""
        for one in self._trackers.values():
            one.attach(callbacks)

    def add_options(self, options: Mapping[str, Any]) -> None:
        """Send the options, without secrets."""
        masked = mask(dict(options))
        self._each("The options were", lambda one: one.add_options(masked))

    def add_evaluation(self, when: str, evaluation: Evaluation, step: int) -> None:
        """Send all metrics with the ends of their intervals, where they are known.

        Args:
            when: before or after: the first part of their names.
            evaluation: The metrics.
            step: Number of completed steps.
        """
        numbers: dict[str, float] = {}
        for name, metric in evaluation.metrics.items():
            numbers[f"{when}/{name}"] = metric.value
            numbers[f"{when}/{name}_low"] = metric.low
            numbers[f"{when}/{name}_high"] = metric.high
            numbers[f"{when}/{name}_count"] = metric.count
        known = {name: float(value) for name, value in numbers.items() if math.isfinite(value)}
        self._each(
            f"The metrics {when} the training were", lambda one: one.add_metrics(known, step)
        )

    def add_routing(self, log: RoutingWriter, step: int) -> None:
        """Send the picture of all decisions of the log."""
        if not self._trackers:
            return
        try:
            log.flush()
            pixels, experts = routing_image(log.directory.parent)
        except Exception as error:  # of any library: a picture must not end a training
            _warn("The picture of the routing was", "its trackers", error)
            return
        caption = f"layers x steps; {', '.join(experts)} in the order of the colours"
        self._each(
            "The picture of the routing was", lambda one: one.add_image(TAG, pixels, caption, step)
        )

    def close(self, *, failed: bool) -> None:
        """Close all."""
        self._each("The end of the run was", lambda one: one.close(failed=failed))

    def _each(self, what: str, send: Callable[[Tracker], None]) -> None:
        for name, one in self._trackers.items():
            try:
                send(one)
            except Exception as error:  # of any library: a tracker must not end a training
                _warn(what, name, error)


def _warn(what: str, tracker: str, error: Exception) -> None:
    warnings.warn(f"{what} not sent to {tracker}: {reason_of(error)}", stacklevel=4)


@contextmanager
def tracking_of(
    arguments: TrainingArguments, checkpoints: Path, *, is_main: bool
) -> Iterator[Tracking]:
    """Yield the trackers that `report_to` names, and close them after the block.

    Args:
        arguments: The trainer's arguments.
        checkpoints: The run's directory of checkpoints.
        is_main: Whether this process is rank 0; others have none.
    """
    names = [name for name in arguments.report_to if name in KINDS] if is_main else []
    tracking = Tracking({name: KINDS[name](arguments, checkpoints / FOLDER) for name in names})
    failed = True
    try:
        yield tracking
        failed = False
    finally:
        tracking.close(failed=failed)


class TrackingCallback(TrainerCallback):
    """Sends options and first metrics before the first step, the picture after the last.

    Args:
        tracking: The trackers.
        options: The run's options by name.
        before: Metrics of the base; None if they were sent by an earlier part of the training.
        writer: The log of decisions; None without routing.
    """

    def __init__(
        self,
        tracking: Tracking,
        options: Mapping[str, Any],
        before: Evaluation | None,
        writer: RoutingWriter | None,
    ) -> None:
        self._tracking = tracking
        self._options = options
        self._before = before
        self._writer = writer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send options and other values that are fixed before the steps."""
        self._tracking.add_options(self._options)
        if self._before is not None:
            self._tracking.add_evaluation("before", self._before, 0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the picture if this was the last step."""
        is_last = state.global_step >= state.max_steps or control.should_training_stop
        if is_last and state.is_world_process_zero and self._writer is not None:
            self._tracking.add_routing(self._writer, state.global_step)
