"""Route a few steps at small memory, and write the assignment that follows; no model is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from molf.job.ahead.short import short_training
from molf.job.inputs import Inputs
from molf.job.progress import Reporter
from molf.job.record.ownership import ASSIGNMENT, CHECKPOINTS
from molf.job.settings.probe import ProbeSettings
from molf.ranks import check_alone

if TYPE_CHECKING:
    from molf.job.advice.advice import Advice


@dataclass(frozen=True)
class Probe:
    """The result of a probe.

    Attributes:
        directory: The directory, with the routing log and `assignment.yaml`.
        advice: The assignment and its evidence.
        seconds: Time of the steps.
        peak_memory_bytes: Peak memory of the device, or of the process on a CPU.
        peak_memory_of: The memory that was measured, such as `process`.
        tokens: Tokens trained on.
        trained_parameters: Parameters with optimizer state.
    """

    directory: Path
    advice: Advice
    seconds: float
    peak_memory_bytes: int
    peak_memory_of: str
    tokens: int
    trained_parameters: int

    @property
    def assignment(self) -> Path:
        """The file of the assignment."""
        return self.directory / ASSIGNMENT


def probe(
    settings: ProbeSettings,
    *,
    share: float | None = None,
    by: str = "wins",
    reporter: Reporter | None = None,
    inputs: Inputs | None = None,
) -> Probe:
    """Train a few steps with `molf`, and write its decisions and the assignment by them.

    Args:
        settings: The options.
        share: As in `molf.job.advice.advice.advise`.
        by: The same.
        reporter: Shows the progress; on standard error if not given.
        inputs: Returns task and base; loaded if not given.

    Raises:
        InputError: The options, the data or the model are wrong. Nothing was written.
        RunError: The probe failed; its directory holds the traceback.
    """
    check_alone("molf probe")
    with short_training(settings.training, "probe", reporter, inputs) as short:
        from molf.disk.files import write_text
        from molf.job.advice.advice import advise
        from molf.job.memory import peak_memory, reset_peak_memory
        from molf.job.record.finished_run import read_run
        from molf.job.record.stages import Stages
        from molf.job.records import ConfigRecord
        from molf.job.trainer.tracking import tracking_of
        from molf.job.training import run_training

        opening, directory = short.opening, short.directory
        record = ConfigRecord(opening, short.task, short.files, short.started)
        record.add_probe()
        record.write(directory)
        device = opening.arguments.device
        reset_peak_memory(device)
        checkpoints = directory / CHECKPOINTS
        with tracking_of(opening.arguments, checkpoints, is_main=True) as tracking:
            tracking.open({})
            training = run_training(
                opening, directory, short.reporter, tracking=tracking, keeps_model=False
            )
        peak, peak_of = peak_memory(device)
        record.add_training(training)
        record.write(directory)
        advice = advise(read_run(directory.path), share=share, by=by)
        write_text(directory / ASSIGNMENT, advice.assignment.to_yaml())
        directory.complete()
        Stages(directory, opening.settings).clear()  # the trainer made its empty folder
    return Probe(
        directory=directory.path,
        advice=advice,
        seconds=training.seconds,
        peak_memory_bytes=peak,
        peak_memory_of=peak_of,
        tokens=training.tokens,
        trained_parameters=training.trained_parameters,
    )
