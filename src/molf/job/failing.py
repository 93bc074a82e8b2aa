"""End a run that fails after its directory was made: discard the directory, or say where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from molf.checkpoint.store import complete_checkpoints
from molf.errors import InputError
from molf.job.progress import Reporter
from molf.job.record.directory import RunDirectory
from molf.job.record.ownership import CHECKPOINTS, MODEL
from molf.job.record.result import ResumeError, RunError, StoppedError
from molf.job.record.resumed_run import command_to_resume
from molf.job.record.tracebacks import write_traceback
from molf.ranks import lost_process, ranks


class NotStartedError(Exception):
    """The base cannot be measured on the data, or a tracker not opened. Raised before training."""


@contextmanager
def failing_in(directory: RunDirectory, reporter: Reporter) -> Iterator[None]:
    """Convert errors of the block, and leave the run's directory as they demand.

    Raises:
        InputError: The base cannot be measured, or a tracker not opened: the directory was deleted,
            the earlier run is back. Or the run cannot be resumed: the directory is unchanged.
        StoppedError: A signal stopped the training.
        RunError: Any other error; the directory holds the files written so far and the traceback.
        KeyboardInterrupt: After a line with the path of the files.
    """
    try:
        yield
    except (ResumeError, StoppedError):
        raise
    except NotStartedError as error:
        if not directory.is_resumed:
            directory.discard()
        raise InputError(str(error)) from error
    except Exception as error:
        if ranks().is_main:
            raise _failed(directory, error) from error
        raise RunError(_cause(error)) from error
    except KeyboardInterrupt:
        reporter.say(
            f"Interrupted; the written files are in {directory.path}.{directory.kept()}"
            f"{way_on(directory)}"
        )
        raise


def _failed(directory: RunDirectory, error: Exception) -> RunError:
    log = write_traceback(directory)
    return RunError(
        f"{_cause(error)} {log}{_trained(directory)}{directory.kept()}{way_on(directory)}"
    )


def _cause(error: Exception) -> str:
    return lost_process(error) or str(error).strip().split("\n")[0] or type(error).__name__


def way_on(directory: RunDirectory) -> str:
    """Return a sentence with the command that continues a run; empty without a checkpoint."""
    if not complete_checkpoints(directory / CHECKPOINTS):
        return ""
    return f" {command_to_resume(directory.path)}"


def _trained(directory: RunDirectory) -> str:
    """Return a sentence with the path of the trained model, if it was saved before the failure."""
    model = directory / MODEL
    return f" The trained model is whole in {model}." if (model / "config.json").is_file() else ""
