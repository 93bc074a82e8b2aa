"""The state of a training beside model and optimizer: logs, counts, and those of its method."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from molf.data.encoding import EncodedSamples
from molf.job.record.result import ResumeError
from molf.job.record.routing_log import RoutingWriter
from molf.job.record.wins import Wins
from molf.job.trainer.best import Best
from molf.job.trainer.callbacks import MetricsCallback
from molf.job.trainer.ending import Ending
from molf.job.trainer.step_guard import StepGuard


@runtime_checkable
class Stateful(Protocol):
    """A callback of a method with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as values that `torch.load` reads with `weights_only=True`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state; its tensors are on the CPU."""


@dataclass(frozen=True)
class RunParts:
    """Parts of a run whose states are in its checkpoints.

    Attributes:
        writer: The routing log.
        metrics: The log of metrics.
        wins: Counts of decisions.
        guard: Counts of skipped steps, and sums of losses.
        ending: Why the training ended early.
        best: The best of its evaluations.
        callbacks: Callbacks of the method; those with a state are saved.
        frozen: Checksum of each frozen weight, as it was prepared.
        data: Hash of the examples in their order.
    """

    writer: RoutingWriter
    metrics: MetricsCallback
    wins: Wins
    guard: StepGuard
    ending: Ending
    best: Best
    callbacks: tuple[Any, ...]
    frozen: Mapping[str, int]
    data: str

    def state_dict(self) -> dict[str, Any]:
        """Write all log entries; return the states.

        Raises:
            OSError: A log cannot be written.
        """
        return {
            "routing": self.writer.state_dict(),
            "metrics": self.metrics.state_dict(),
            "wins": self.wins.state_dict(),
            "guard": self.guard.state_dict(),
            "ending": self.ending.state_dict(),
            "best": self.best.state_dict(),
            "method": {name: part.state_dict() for name, part in self._of_method()},
            "frozen": dict(self.frozen),
            "data": self.data,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Compare the examples and the frozen weights with those of a state.

        Raises:
            ResumeError: They differ.
        """
        if state["data"] != self.data:
            raise ResumeError(
                "The run cannot be resumed: its examples have changed since it was started, or "
                "their tokens. Give another --output_dir."
            )
        changed = [
            name for name, known in state["frozen"].items() if self.frozen.get(name) != known
        ]
        if changed:
            raise ResumeError(
                f"The run cannot be resumed: {len(changed)} of {len(state['frozen'])} frozen "
                f"weights differ from those that it was started with, the first is {changed[0]}. "
                "The base model has changed. Give another --output_dir."
            )

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Replace the states, and cut the logs to the step of the checkpoint."""
        self.wins.load_state_dict(state["wins"])
        self.guard.load_state_dict(state["guard"], device)
        self.ending.load_state_dict(state.get("ending", {}))  # of earlier versions: none
        self.best.load_state_dict(state.get("best", {}))
        self.load_method(state)
        self.metrics.load_state_dict(state["metrics"])
        self.writer.load_state_dict(state["routing"])

    def load_method(self, state: Mapping[str, Any]) -> None:
        """Replace the states of the method's callbacks."""
        for name, part in self._of_method():
            part.load_state_dict(state["method"][name])

    def clear_logs(self) -> None:
        """Delete the log entries of an earlier try, for a run that starts from the beginning."""
        self.metrics.load_state_dict({"bytes": 0})
        self.writer.load_state_dict({"parts": 0})

    def _of_method(self) -> Iterable[tuple[str, Stateful]]:
        return (
            (type(callback).__name__, callback)
            for callback in self.callbacks
            if isinstance(callback, Stateful)
        )


def hash_of_examples(samples: EncodedSamples) -> str:
    """Return the SHA-256 of the tokens and labels of all examples, in their order."""
    digest = hashlib.sha256()
    for rows in (samples.input_ids, samples.labels):
        for row in rows:
            digest.update(array("q", (len(row), *row)).tobytes())
    return digest.hexdigest()
