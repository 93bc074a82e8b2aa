"""Save checkpoints during training; one that cannot be written does not end the training."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from molf.disk.room import directory_bytes, free_bytes, is_disk_full, megabytes
from molf.errors import reason_of
from molf.job.model.room_needed import Needed
from molf.job.record.ownership import read_json

_STATE = "trainer_state.json"  # the last file that the trainer writes
_MARGIN = 1_000_000  # bytes; files take whole blocks, and the log grows
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter", "inline_container", "Parent directory")


class Checkpoints:
    """Saves checkpoints if enough disk space for the trained model remains.

    Args:
        room: The estimated bytes of a checkpoint and of the trained model.

    Attributes:
        missing: Steps whose checkpoints were not written.
    """

    def __init__(self, room: Needed) -> None:
        self._at_the_end = room.at_the_end
        self._one = room.checkpoint  # bytes; estimated, then those of the largest checkpoint
        self.missing: list[int] = []

    def save(self, save: Callable[[], None], directory: Path, step: int) -> None:
        """Save a checkpoint, or warn if it cannot be written.

        Args:
            save: Writes the checkpoint.
            directory: Its directory.
            step: The completed optimizer step.

        Warns:
            UserWarning: It was not written; its incomplete files are deleted.
        """
        free = free_bytes(directory)
        needed = self._one + self._at_the_end + _MARGIN
        # The trained model matters more than a checkpoint, so its space is left free.
        if free is not None and free < needed:
            self._warn(
                step,
                f"it takes about {megabytes(self._one)}, the trained model will take "
                f"{megabytes(self._at_the_end)}, and {megabytes(free)} are free",
            )
            return
        try:
            save()
        except Exception as error:
            if not _cannot_write(error):
                raise
            # The trainer deletes old checkpoints last, which may fail after this one is whole.
            if read_json(directory / _STATE) is None:
                shutil.rmtree(directory, ignore_errors=True)
            self._warn(step, "the disk is full" if is_disk_full(error) else reason_of(error))
        else:
            self._one = max(self._one, directory_bytes(directory))

    def _warn(self, step: int, reason: str) -> None:
        if not self.missing:
            warnings.warn(
                f"The checkpoint of step {step} was not written: {reason}. Training continues, "
                "and molf tries to write the next checkpoint.",
                stacklevel=2,
            )
        self.missing.append(step)

    def warn_of_missing(self) -> None:
        """Warn at the end of the training if several checkpoints are missing."""
        # One missing checkpoint has its own warning already.
        if len(self.missing) > 1:
            steps = ", ".join(map(str, self.missing[:5]))
            more = ", ..." if len(self.missing) > 5 else ""
            warnings.warn(
                f"{len(self.missing)} checkpoints were not written (steps {steps}{more}).",
                stacklevel=2,
            )


def _cannot_write(error: Exception) -> bool:
    """Return whether an error comes from writing to disk."""
    if isinstance(error, (OSError, SafetensorError)) or is_disk_full(error):
        return True
    if "(os error " in str(error):  # tokenizers raises a plain Exception
        return True
    return isinstance(error, RuntimeError) and any(x in str(error) for x in _TORCH_CANNOT_WRITE)
