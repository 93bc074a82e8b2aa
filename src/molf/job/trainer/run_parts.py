"""The state of a training beside model and optimizer: logs, counts, and those of its method."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

from molf.data.encoding import EncodedSamples
from molf.job.methods import TrainingData
from molf.job.record.result import ResumeError
from molf.job.record.routing_log import RoutingWriter
from molf.job.record.wins import Wins
from molf.job.trainer.best import Best
from molf.job.trainer.callbacks import MetricsCallback
from molf.job.trainer.ending import Ending
from molf.job.trainer.step_guard import StepGuard

RECORDS = "records:"
"""Start of a hash of records, whose tokens are not all known."""


@runtime_checkable
class Stateful(Protocol):
    """A callback of a method with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as values that `torch.load` reads with `weights_only=True`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state; its tensors are on the CPU."""


@dataclass
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
        data: The examples in their order.
    """

    writer: RoutingWriter
    metrics: MetricsCallback
    wins: Wins
    guard: StepGuard
    ending: Ending
    best: Best
    callbacks: tuple[Any, ...]
    frozen: Mapping[str, int]
    data: TrainingData

    @cached_property
    def data_hash(self) -> str:
        """Hash of the examples in their order."""
        return hash_of_rows(self.data)

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
            "data": self.data_hash,
        }

    def check(self, state: Mapping[str, Any]) -> None:
        """Compare the examples and the frozen weights with those of a state.

        Raises:
            ResumeError: They differ.
        """
        # Runs that were started before on-demand tokenization have a hash of all tokens.
        if state["data"] not in (self.data_hash, *self._hash_of_tokens(state["data"])):
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

    def _hash_of_tokens(self, stored: str) -> tuple[str, ...]:
        samples = self.data.samples
        if samples.known is None or stored.startswith(RECORDS):
            return ()
        return (hash_of_tokens(samples),)

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


def hash_of_rows(data: TrainingData) -> str:
    """Return a hash of all examples in their order, and of their division into packed rows."""
    examples = hash_of_examples(data.samples)
    if data.packed is None:
        return examples
    digest = hashlib.sha256(examples.encode())
    _update(digest, data.packed)
    return digest.hexdigest()


def hash_of_examples(samples: EncodedSamples) -> str:
    """Return a hash of all examples in their order: of tokens and labels where all are known.

    Of samples that are tokenized on demand, it is that of their records and of the known tokens.
    """
    if samples.known is None:
        return hash_of_tokens(samples)
    digest = hashlib.sha256(samples.records_hash.encode())
    _update(digest, samples.known)
    return f"{RECORDS}{digest.hexdigest()}"


def hash_of_tokens(samples: EncodedSamples) -> str:
    """Return the SHA-256 of the tokens and labels of all examples, in their order."""
    digest = hashlib.sha256()
    for rows in (samples.input_ids, samples.labels):
        _update(digest, rows)
    return digest.hexdigest()


def _update(digest: Any, rows: Iterable[Sequence[int]]) -> None:
    for row in rows:
        digest.update(array("q", (len(row), *row)).tobytes())
