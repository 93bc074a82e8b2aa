"""Write checkpoints while the training waits, or from a copy while it continues."""

from __future__ import annotations

import dataclasses
import io
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molf.checkpoint.store import VALUES, delete_old, write_checkpoint
from molf.checkpoint.tensors import write_tensors
from molf.ranks import ALONE, Ranks


class CheckpointError(Exception):
    """A checkpoint could not be written; the cause is the error.

    Attributes:
        step: Its step.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"the checkpoint of step {step} could not be written")
        self.step = step


@dataclass
class Snapshot:
    """The state of a training after a step.

    Attributes:
        step: Number of completed optimizer steps.
        tensors: Tensors by name, which share memory with the training.
        values: Plain values, which `torch.load` reads with `weights_only=True`.
        texts: Further files, by name.
        write_more: Writes further files into a directory; not possible in the background.
    """

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    texts: Mapping[str, str] = field(default_factory=dict)
    write_more: Callable[[Path], None] | None = None


@dataclass
class Totals:
    """Measurements of all checkpoints of a training.

    Attributes:
        count: Number of checkpoints that were written.
        nbytes: Bytes of the largest.
        pause_seconds: Time that the training waited for them.
        write_seconds: Time of the writing.
    """

    count: int = 0
    nbytes: int = 0
    pause_seconds: float = 0.0
    write_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return them for the checkpoint that is made now, which they do not count yet."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the checkpoint that has this state."""
        vars(self).update(state)
        self.count += 1

    def record(self, training_seconds: float) -> dict[str, Any]:
        """Return them for the record of a run, with the share of its time; empty for none."""
        if not self.count:
            return {}
        return {
            "count": self.count,
            "bytes": self.nbytes,
            "pause_seconds": round(self.pause_seconds, 3),
            "write_seconds": round(self.write_seconds, 3),
            "share_of_training": round(self.pause_seconds / max(training_seconds, 1e-9), 4),
        }


class CheckpointWriter:
    """Writes checkpoints into a directory, and deletes old ones after each.

    Args:
        directory: Returns the directory, which may move during the training.
        keep: Number of complete checkpoints that remain; None for all.
        in_background: Copy the state to host memory, and write the copy in a thread. A further
            checkpoint waits until the one before it is written. The copy takes as much host memory
            as the state.
        ranks: Processes that write each checkpoint together; all make the same calls.
        spared: Returns the steps whose checkpoints remain beside these.

    Attributes:
        totals: Measurements so far.
    """

    def __init__(
        self,
        directory: Callable[[], Path],
        keep: int | None = None,
        *,
        in_background: bool = False,
        ranks: Ranks = ALONE,
        spared: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self.totals = Totals()
        self._directory = directory
        self._keep = keep
        self._in_background = in_background
        self._ranks = ranks
        self._spared = spared
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failed: CheckpointError | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, or start to write it in the background.

        Raises:
            CheckpointError: It cannot be written, or one before it in the background could not;
                call `wait` first to tell them apart. Earlier checkpoints are unchanged.
        """
        self.wait()
        started = time.perf_counter()
        values = _serialised(snapshot.values)
        if self._in_background:
            given = snapshot, self._copy(snapshot.tensors), values
            self._thread = threading.Thread(target=self._try, args=given, name="checkpoint")
            self._thread.start()
        else:
            self._try(snapshot, snapshot.tensors, values)
        self.totals.pause_seconds += time.perf_counter() - started
        if not self._in_background:
            self.wait()

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            CheckpointError: The last one could not be written.
        """
        started = time.perf_counter()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
            self.totals.pause_seconds += time.perf_counter() - started
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _try(self, snapshot: Snapshot, tensors: Mapping[str, Tensor], values: bytes) -> None:
        try:
            self._write(snapshot, tensors, values)
        except Exception as error:
            # Raised by `wait`, in the thread of the training.
            self._failed = CheckpointError(snapshot.step)
            self._failed.__cause__ = error

    def _write(self, snapshot: Snapshot, tensors: Mapping[str, Tensor], values: bytes) -> None:
        def write(directory: Path) -> None:
            write_tensors(directory, tensors, self._ranks.group)
            if not self._ranks.is_main:
                return
            (directory / VALUES).write_bytes(values)
            for name, text in snapshot.texts.items():
                (directory / name).write_text(text, encoding="utf-8")
            if snapshot.write_more is not None and not self._in_background:
                snapshot.write_more(directory)

        started = time.perf_counter()
        directory = self._directory()
        path = directory / f"checkpoint-{snapshot.step}"
        nbytes = write_checkpoint(path, snapshot.step, write, self._ranks)
        self.totals.count += 1
        self.totals.nbytes = max(self.totals.nbytes, nbytes)
        self.totals.write_seconds += time.perf_counter() - started
        if self._keep is not None and self._ranks.is_main:
            delete_old(directory, self._keep, self._spared())

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to host memory, which is allocated once."""
        self._copies = {
            name: copy
            for name, copy in self._copies.items()
            if name in tensors
            and (copy.shape, copy.dtype) == (tensors[name].shape, tensors[name].dtype)
        }
        for name, tensor in tensors.items():
            if name not in self._copies:
                pins = tensor.device.type == "cuda"
                self._copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=pins)
            self._copies[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # without it, only the current device
        return self._copies


def _serialised(values: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    return buffer.getvalue()
