"""The steps of a run whose options, data and places were checked: from the model to the records."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from molf.checkpoint.store import newest_checkpoint
from molf.errors import InputError
from molf.job.evaluating import Evaluator
from molf.job.failing import failing_in
from molf.job.inputs import Inputs
from molf.job.memory import peak_memory, reset_peak_memory
from molf.job.model.loading import LoadedModel
from molf.job.model.saving import SaveError
from molf.job.opening import Opening, open_training
from molf.job.overview import overview
from molf.job.progress import Reporter
from molf.job.record.directory import RunDirectory, open_directory
from molf.job.record.ownership import CHECKPOINTS, ENVIRONMENT, MODEL, read_json
from molf.job.record.result import RunResult
from molf.job.record.resumed_run import check_same_contents
from molf.job.record.stages import Stages
from molf.job.records import ConfigRecord, add_row, input_files, run_result, write_evaluations
from molf.job.settings.resolved import ResolvedSettings
from molf.job.trained_model import TrainedModel
from molf.job.trainer.result import Training
from molf.job.trainer.run_parts import hash_of_rows
from molf.job.trainer.tracking import Tracking, tracking_of
from molf.job.training import run_training
from molf.measure import Evaluation
from molf.ranks import Ranks, ranks
from molf.tasks import Task


def run_checked(
    settings: ResolvedSettings,
    task: Task,
    forgetting_text: str,
    reporter: Reporter,
    inputs: Inputs,
    started: datetime,
) -> RunResult:
    """Train and measure a model, and write its run directory, as `molf.job.run.train`.

    Args:
        settings: The checked options.
        task: The task with its records.
        forgetting_text: The plain text that forgetting is measured on.
        reporter: Shows the progress.
        inputs: Returns the base and its evaluation.
        started: Start of the run.
    """
    # Open and check: nothing is written yet.
    opening, files = _open(settings, task, inputs, reporter)
    processes = ranks()  # connected by `_open`
    settings, arguments = opening.settings, opening.arguments
    directory = open_directory(
        processes, settings.output_dir, overwrite=settings.overwrite, resume=settings.resume
    )
    if settings.resume and not directory.is_resumed:
        reporter.say(f"There is no run in {directory.path} to resume: a new one begins.")
    with (
        directory,
        failing_in(directory, reporter),
        tracking_of(arguments, directory / CHECKPOINTS, is_main=processes.is_main) as tracking,
    ):
        earlier = read_json(directory / ENVIRONMENT) if directory.is_resumed else None
        run = _Run(
            opening=opening,
            task=task,
            inputs=inputs,
            started=started,
            reporter=reporter,
            directory=directory,
            tracking=tracking,
            stages=Stages(directory, settings),
            record=ConfigRecord(opening, task, files, started, earlier),
            evaluator=Evaluator(
                settings, task, forgetting_text, arguments.device, reporter, opening.sharding
            ),
        )
        run.begin()
        before = run.measure_base()
        trained, saved = run.train(before)
        loaded, after = run.measure_saved(trained)
        return processes.on_main(lambda: run.write_records(trained, saved, loaded, after))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a run that its steps use; the steps are methods, in their order.

    Attributes:
        opening: The checked training with its model and data.
        task: The task with its records.
        inputs: Returns the base's evaluation and logits.
        started: Start of the run.
        reporter: Shows the progress.
        directory: The run's directory.
        tracking: The trackers.
        stages: Completed stages of the run that is resumed.
        record: Settings, environment and figures of the run.
        evaluator: Measures the base and the saved model.
    """

    opening: Opening
    task: Task
    inputs: Inputs
    started: datetime
    reporter: Reporter
    directory: RunDirectory
    tracking: Tracking
    stages: Stages
    record: ConfigRecord
    evaluator: Evaluator

    def begin(self) -> None:
        """Write the settings, and open the trackers."""
        on_main = ranks().on_main
        on_main(lambda: self.record.write(self.directory))
        # First of all: a tracker without a login, for example, ends the run here.
        on_main(lambda: self.stages.keep_trackers(self.tracking.open(self.stages.trackers)))

    def measure_base(self) -> Evaluation:
        """Return the evaluation of the base; a resumed run measures it only if it was not kept."""
        reset_peak_memory(self.opening.arguments.device)
        on_main, evaluator, stages = ranks().on_main, self.evaluator, self.stages
        kept = on_main(lambda: stages.before)
        if kept is not None:
            evaluator.seconds += on_main(lambda: stages.evaluation_seconds)
            return kept
        measured = evaluator.base(self.opening.base, self.inputs)
        on_main(lambda: stages.keep_before(measured, evaluator.seconds))
        return measured

    def train(self, before: Evaluation) -> tuple[TrainedModel, Mapping[str, Any]]:
        """Train the model, save it and free it, unless the run that is resumed has done so.

        Args:
            before: The evaluation of the base.

        Returns:
            The model, and the record of the saved one.
        """
        on_main = ranks().on_main
        done = on_main(lambda: self.stages.saved)
        if done is None:
            training = run_training(
                self.opening,
                self.directory,
                self.reporter,
                checkpoint=on_main(self._newest_checkpoint),
                tracking=self.tracking,
                before=before,
            )
        else:
            self.reporter.say(f"Resuming {self.directory.path}: the model is trained and saved.")
            training = Training.of_record(done[0])
        self.record.add_training(training)
        trained = TrainedModel(self.opening, self.directory, self.task, training, before)
        # Save before anything else: a file that cannot be written must not lose the training.
        saved = self._save(trained) if done is None else done[1]
        trained.free()
        self.record.add_saved(saved)
        on_main(lambda: self.record.write(self.directory))
        return trained, saved

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint of a resumed run, and show where it continues."""
        if not self.directory.is_resumed:
            return None
        found = newest_checkpoint(self.directory / CHECKPOINTS)
        path = self.directory.path
        if found is None:
            self.reporter.say(
                f"{path} has no complete checkpoint: the training starts from the beginning."
            )
        else:
            self.reporter.say(f"Resuming {path} from {found.name}.")
        return found

    def _save(self, trained: TrainedModel) -> dict[str, Any]:
        """Save the model, and return its record."""
        on_main = ranks().on_main
        try:
            with self.reporter.working("Saving the model"):
                saved = on_main(trained.save)
        except SaveError:
            with suppress(OSError):
                on_main(lambda: self.record.write(self.directory))
            raise
        on_main(lambda: self.stages.keep_saved(trained.training.record(), saved))
        return saved

    def measure_saved(self, trained: TrainedModel) -> tuple[LoadedModel, Evaluation]:
        """Load the saved model, and compare it with the base: one model in memory at a time."""
        directory = self.directory
        base_logits = self.evaluator.base_logits(self.inputs)
        # The directory may have been moved.
        directory.path = ranks().on_main(lambda: (directory / MODEL).parent)
        loaded = trained.load()
        after = self.evaluator.saved(loaded, base_logits)
        self.tracking.add_evaluation("after", after, trained.training.steps)
        return loaded, after

    def write_records(
        self,
        trained: TrainedModel,
        saved: Mapping[str, Any],
        loaded: LoadedModel,
        after: Evaluation,
    ) -> RunResult:
        """Write all that is known at the end, and complete the directory."""
        directory, training, before = self.directory, trained.training, trained.before
        trained.write_card(loaded, after, saved)
        memory = peak_memory(self.opening.arguments.device)
        self.record.add_costs(training.seconds, memory)
        self.record.write(directory)  # once more: the directory may have been deleted since
        write_evaluations(directory, self.task, before, after)
        seconds = self.evaluator.seconds
        result = run_result(
            self.opening, directory, training, before, after, saved, seconds, memory
        )
        directory.complete()
        row = add_row(result, self.opening.settings, self.started, self.record.identity)
        self.stages.clear()
        return replace(result, results=row)


def _open(
    settings: ResolvedSettings, task: Task, inputs: Inputs, reporter: Reporter
) -> tuple[Opening, dict[str, Any]]:
    """Open the training, and show its overview; return it and the record of its input files."""
    opening = open_training(settings, task, inputs, reporter)
    processes = ranks()
    opening.settings = replace(opening.settings, output_dir=_agreed(opening, processes))
    files = input_files(opening.settings, task)
    if settings.resume:
        processes.on_main(lambda: check_same_contents(opening.settings, files))
    for line in (*overview(opening, task, processes.count), *opening.notes):
        reporter.say(line)
    return opening, files


def _agreed(opening: Opening, processes: Ranks) -> Path:
    """Wait until all processes have opened the training; return rank 0's output directory.

    Raises:
        InputError: Another process has other examples.
    """
    examples = hash_of_rows(opening.data) if processes.count > 1 else ""
    found = processes.gather((opening.settings.output_dir, examples))
    differing = [rank for rank, (_, those) in enumerate(found) if those != found[0][1]]
    if differing:
        raise InputError(
            f"The examples of rank {differing[0]} differ from those of rank 0: --data or the "
            "tokenizer is not the same on all machines."
        )
    return found[0][0]  # its default has the time in it
