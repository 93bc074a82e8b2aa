"""What happens around the trainer's steps: checks, the routing log, metrics and progress."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.core.adamw import AdamW
from molf.train.log_file import LogFile
from molf.train.methods.base import Prepared
from molf.train.routing_log import RoutingWriter
from molf.train.wins import Wins


class RoutingCallback(TrainerCallback):
    """After each optimizer step: checks the optimizer once, logs and counts its decisions.

    Args:
        prepared: What the trainer was given.
        writer: Where decisions are logged.
        wins: Where they are counted.
    """

    def __init__(self, prepared: Prepared, writer: RoutingWriter, wins: Wins) -> None:
        self._prepared = prepared
        self._writer = writer
        self._wins = wins
        self._checked = False

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Log the step that was just taken."""
        optimizer = unwrapped(optimizer)
        routing = getattr(optimizer, "routing", None)
        skipped = not routing and getattr(optimizer, "skipped_steps", 0) > 0
        if not self._checked and not skipped:
            self._check(optimizer)
            self._checked = True
        if routing:
            self._writer.add(state.global_step, routing)
            self._wins.add(routing, state.global_step + 1)

    def _check(self, optimizer: Any) -> None:
        """Whatever wrapped or replaced the optimizer on the way would train something else."""
        expected = self._prepared.optimizer_class
        if type(optimizer) is not expected:
            raise RuntimeError(
                f"The trainer uses {type(optimizer).__name__} instead of {expected.__name__}."
            )
        if not hasattr(optimizer, "routing"):
            return
        held = {group["layer"] for group in optimizer.param_groups}
        missing = [name for name in self._prepared.layers if name not in held]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._prepared.layers)} layers are not routed by the "
                f"trainer's optimizer; the first is {missing[0]}."
            )
        if not optimizer.routing:
            raise RuntimeError(
                f"None of the {len(self._prepared.layers)} layers had a gradient in the first step."
            )


class FidelityCallback(TrainerCallback):
    """Has what rounding loses measured in the steps that will be logged."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Say whether the coming step is one of them."""
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, AdamW):
            step = state.global_step + 1
            is_logged = step % state.logging_steps == 0
            optimizer.measure_updates = is_logged or step == 1 or step >= state.max_steps


def fidelity_figures(optimizer: Any) -> dict[str, float]:
    """What rounding lost of the last step's updates, for the log; empty if not measured."""
    measured = getattr(unwrapped(optimizer), "update_fidelity", None)
    return {} if measured is None else {"lost_updates": measured.lost, "update_kept": measured.kept}


def unwrapped(optimizer: Any) -> Any:
    """The optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class MetricsCallback(TrainerCallback):
    """Appends each of the trainer's log entries to `metrics.jsonl`, and shows it.

    Args:
        path: Tells where the file is, each time that a line is written.
        show: Shows a step, and its log entry if it has one.
        without: Figures of the trainer's that mean nothing in this run.
    """

    def __init__(
        self,
        path: Callable[[], Path],
        show: Callable[[int, dict[str, Any] | None], None],
        without: tuple[str, ...] = (),
    ) -> None:
        self._file = LogFile(path)
        self._show = show
        self._without = without

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the progress on, and have the last step logged as well."""
        self._show(state.global_step, None)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line; the trainer's closing summary is not one of them."""
        if not logs or "loss" not in logs:
            return
        logs = {name: value for name, value in logs.items() if name not in self._without}
        record = {"step": state.global_step, **{k: _as_json(v) for k, v in logs.items()}}
        self._file.add(json.dumps(record))
        self._show(state.global_step, logs)


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Throughput:
    """Tokens per second since the last look."""

    def __init__(self) -> None:
        self._tokens = 0
        self._time = time.perf_counter()

    def since_last(self, tokens: int) -> float:
        """Return the rate, given how many tokens have been seen in all."""
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        return rate
