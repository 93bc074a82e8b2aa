"""Trainer callbacks: checks, the routing log, metrics and progress."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from molf.core.adamw import AdamW
from molf.disk.log_file import LogFile
from molf.job.methods.base import Prepared
from molf.job.record.routing_log import RoutingWriter
from molf.job.record.wins import Wins


class RoutingCallback(TrainerCallback):
    """Checks the optimizer once, and logs and counts its decisions after each step.

    Args:
        prepared: The optimizer class and layers that the trainer was given.
        writer: The log of decisions.
        wins: The counts of decisions.
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
        """Log the completed step."""
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
        """Check that the trainer uses the given optimizer, and that it routes all layers."""
        # A library that wrapped or replaced the optimizer would train with another method.
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


class RandomByStep(TrainerCallback):
    """Seeds the random generators of each of several processes before each step.

    The seed follows from the run's, the step and the rank. So a resumed training needs no states of
    the processes before, whose number may have been another.

    Args:
        seed: The run's seed.
        rank: Number of this process.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._seed = seed
        self._rank = rank

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed Python, NumPy, torch and its devices."""
        key = f"{self._seed}/{state.global_step}/{self._rank}"
        digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
        set_seed(int.from_bytes(digest, "little"))


class FidelityCallback(TrainerCallback):
    """Makes the optimizer measure updates lost by rounding, in the steps that are logged."""

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set `measure_updates` for the next step."""
        optimizer = unwrapped(optimizer)
        if isinstance(optimizer, AdamW):
            step = state.global_step + 1
            is_logged = step % state.logging_steps == 0
            optimizer.measure_updates = is_logged or step == 1 or step >= state.max_steps


def fidelity_figures(optimizer: Any) -> dict[str, float]:
    """Return the last step's updates lost by rounding, for the log; empty if not measured."""
    measured = getattr(unwrapped(optimizer), "update_fidelity", None)
    return {} if measured is None else {"lost_updates": measured.lost, "update_kept": measured.kept}


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


class MetricsCallback(TrainerCallback):
    """Appends each of the trainer's log entries to `metrics.jsonl`, and shows it.

    Args:
        path: Returns the path of the file; called for each line, as the run may be moved. None for
            no file.
        show: Shows a step, and its log entry if it has one.
        is_last: Whether the training has no step left.
        without: Names of the trainer's figures that have no meaning in this run.
    """

    def __init__(
        self,
        path: Callable[[], Path] | None,
        show: Callable[[int, dict[str, Any] | None], None],
        is_last: Callable[[TrainerState], bool],
        without: tuple[str, ...] = (),
    ) -> None:
        self._file = None if path is None else LogFile(path)
        self._show = show
        self._is_last = is_last
        self._without = without

    def state_dict(self) -> dict[str, int]:
        """Flush all lines; return the size of the file in bytes.

        Raises:
            OSError: Lines cannot be written.
        """
        return {"bytes": 0 if self._file is None else self._file.position()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Cut the lines that were written after a state."""
        if self._file is not None:
            self._file.rewind(state["bytes"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the intervals of this part of the training; those of a resumed state are older."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance the progress bar, and request a log entry for the last step."""
        self._show(state.global_step, None)
        if self._is_last(state):
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line."""
        # The trainer's closing summary has neither, and is left out.
        if not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        logs = {name: value for name, value in logs.items() if name not in self._without}
        record = {"step": state.global_step, **{k: _as_json(v) for k, v in logs.items()}}
        if self._file is not None:
            self._file.add(json.dumps(record))
        self._show(state.global_step, logs)


def _as_json(value: Any) -> Any:
    """Return the value, or None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Seconds of a training, summed over its parts.

    Args:
        preparation_seconds: Time before the steps of this part.

    Attributes:
        preparation_seconds: Time before the steps of all parts.
    """

    def __init__(self, preparation_seconds: float) -> None:
        self.preparation_seconds = preparation_seconds
        self._before = 0.0
        self.start()

    def start(self) -> None:
        """Start the steps of this part."""
        self._started = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds of all steps up to now."""
        return self._before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, float]:
        """Return the seconds up to now."""
        return {"seconds": self.seconds(), "preparation": self.preparation_seconds}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Add the parts before this one, and start its steps."""
        self._before = state["seconds"]
        self.preparation_seconds += state["preparation"]
        self.start()


class Throughput:
    """Measures tokens per second between calls."""

    def __init__(self) -> None:
        self._tokens = 0
        self._time = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        """Return the tokens of the last call, and the seconds since then."""
        return {"tokens": self._tokens, "seconds": time.perf_counter() - self._time}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue as if the time between the parts of a training had not passed."""
        self._tokens = int(state["tokens"])
        self._time = time.perf_counter() - state["seconds"]

    def leave_out(self, seconds: float) -> None:
        """Leave out a time in which nothing was trained."""
        self._time += seconds

    def since_last(self, tokens: int) -> float:
        """Return the tokens per second since the last call.

        Args:
            tokens: Tokens since the start.
        """
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        return rate
