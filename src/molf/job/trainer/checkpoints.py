"""Save checkpoints during training; one that cannot be written does not end the training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from molf.amounts import decimal_size
from molf.checkpoint.manifest import DamagedError, check_hashes
from molf.checkpoint.store import complete_checkpoints
from molf.checkpoint.writer import CheckpointError, CheckpointWriter, Snapshot, Totals
from molf.disk.room import free_bytes, is_disk_full
from molf.errors import reason_of
from molf.job.model.room_needed import Needed
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import CHECKPOINTS
from molf.job.record.result import RunError
from molf.job.settings.resolved import ResolvedSettings
from molf.job.trainer.best import Best
from molf.job.trainer.ending import Ending
from molf.job.trainer.stopping import StopRequest
from molf.ranks import ranks

_MARGIN = 1_000_000  # bytes; files take whole blocks, and the log grows
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "Parent directory")


class Checkpoints(TrainerCallback):
    """Decides when a checkpoint is saved, and saves it if the trained model keeps enough room.

    One is due each `save_steps`, each `save_minutes`, after the last step, so that a kill while the
    model is saved and measured repeats only that, and when the training is asked to stop.

    Args:
        settings: The run's settings.
        directory: The run's directory.
        room: The estimated bytes of a checkpoint and of the trained model.
        stop: Whether the training is asked to stop.
        ending: Whether it ends before its planned steps.
        best: The step with the lowest loss; its checkpoint is kept with `keep_best`.

    Attributes:
        missing: Steps whose checkpoints were not written.
        latest: The last step with a complete checkpoint; None if there is none.
    """

    def __init__(
        self,
        settings: ResolvedSettings,
        directory: RunDirectory,
        room: Needed,
        stop: StopRequest,
        ending: Ending,
        best: Best,
    ) -> None:
        self.settings = settings
        self._directory = directory
        self._at_the_end = room.at_the_end
        self._one = room.checkpoint  # bytes; estimated, then those of the largest checkpoint
        self._stop = stop
        self._ending = ending
        self._writer = CheckpointWriter(
            lambda: self._directory / CHECKPOINTS,  # the run may have been moved
            settings.kept_checkpoints,
            in_background=settings.async_save,
            ranks=ranks().further(),
            spared=lambda: best.steps if settings.keep_best else (),
        )
        self._saved_at = time.monotonic()
        self.missing: list[int] = []

    def whole(self, step: int) -> Path | None:
        """Return the checkpoint of a step whose hashes are right; None without it."""
        path = self._directory / CHECKPOINTS / f"checkpoint-{step}"
        try:
            check_hashes(path)
        except DamagedError:
            return None
        return path

    @property
    def latest(self) -> int | None:
        """The last step with a complete checkpoint; None if there is none."""
        found = complete_checkpoints(self._directory / CHECKPOINTS)
        return found[-1][0] if found else None

    @property
    def totals(self) -> Totals:
        """Measurements of the checkpoints of this part of the training."""
        return self._writer.totals

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of `save_minutes`."""
        self._saved_at = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have a checkpoint saved if one is due, and the training stopped if it was asked to."""
        if not self.settings.has_checkpoints:
            return
        # One process decides for all: clocks differ, and a signal may arrive in one alone.
        due = int(ranks().is_main and self._is_due(state))
        self._stop.number, due = ranks().largest([self._stop.number, due])
        if self._stop.name is not None:
            control.should_training_stop = True
        if due or self._stop.name is not None:
            control.should_save = True

    def _is_due(self, state: TrainerState) -> bool:
        step, settings = state.global_step, self.settings
        if self._ending.is_at(state):
            return True
        if settings.save_steps is not None and step % settings.save_steps == 0:
            return True
        waited = time.monotonic() - self._saved_at
        return 0 < settings.save_minutes <= waited / 60

    def save(self, make: Callable[[], Snapshot], step: int) -> None:
        """Save a checkpoint, or start to save it in the background.

        Args:
            make: Returns the state.
            step: The completed optimizer step.

        Raises:
            RunError: It cannot be written, and the run shall stop then.

        Warns:
            UserWarning: It, or one before it in the background, was not written.
        """
        with self._reported():
            self._writer.wait()
        if no_room := ranks().on_main(self._no_room):
            self._miss(step, no_room)
        else:
            with self._reported():
                try:
                    snapshot = ranks().everywhere(make)
                except OSError as error:  # logs that cannot be written before it
                    raise CheckpointError(step) from error
                self._writer.write(snapshot)
            self._one = max(self._one, self.totals.nbytes)
        self._saved_at = time.monotonic()

    def _no_room(self) -> str | None:
        """Return the reason why there is no room for a checkpoint; None if there is."""
        free = free_bytes(self._directory / CHECKPOINTS)
        # The trained model matters more than a checkpoint, so its space is left free.
        if free is None or free >= self._one + self._at_the_end + _MARGIN:
            return None
        return (
            f"it takes about {decimal_size(self._one)}, the trained model will take "
            f"{decimal_size(self._at_the_end)}, and {decimal_size(free)} are free"
        )

    def finish(self) -> None:
        """Wait for a checkpoint in the background, and warn if several are missing.

        Raises:
            RunError: It cannot be written, and the run shall stop then.
        """
        with self._reported():
            self._writer.wait()
        # One missing checkpoint has its own warning already.
        if len(self.missing) > 1:
            steps = ", ".join(map(str, self.missing[:5]))
            more = ", ..." if len(self.missing) > 5 else ""
            warnings.warn(
                f"{len(self.missing)} checkpoints were not written (steps {steps}{more}).",
                stacklevel=2,
            )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Warn of a checkpoint that could not be written to the disk."""
        try:
            yield
        except CheckpointError as failed:
            cause = failed.__cause__
            assert isinstance(cause, Exception)
            if not _cannot_write(cause):
                raise cause from None
            reason = "the disk is full" if is_disk_full(cause) else reason_of(cause)
            if _is_torchs(cause):  # its writer leaves the system's reason out
                reason = "a file of it was cut short (full disk, quota or size limit)"
            self._miss(failed.step, reason, cause)

    def _miss(self, step: int, reason: str, cause: Exception | None = None) -> None:
        self.missing.append(step)
        latest = self.latest
        older = "There is none before it." if latest is None else f"That of step {latest} is whole."
        what = f"The checkpoint of step {step} was not written: {reason}."
        if self.settings.on_save_error == "stop":
            raise RunError(f"{what} {older} (on_save_error=stop)") from cause
        if len(self.missing) == 1:
            warnings.warn(
                f"{what} {older} Training continues, and molf tries to write the next checkpoint.",
                stacklevel=2,
            )


def _cannot_write(error: Exception) -> bool:
    """Return whether an error comes from writing to disk."""
    if isinstance(error, (OSError, SafetensorError)) or is_disk_full(error):
        return True
    if "(os error " in str(error):  # tokenizers raises a plain Exception
        return True
    return _is_torchs(error)


def _is_torchs(error: Exception) -> bool:
    """Return whether torch's own writer of files has failed."""
    return isinstance(error, RuntimeError) and any(x in str(error) for x in _TORCH_CANNOT_WRITE)
