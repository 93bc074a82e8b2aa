"""Run a training, or a dry run, from its options.

`train` and `_train` are a run from its first check to its last record, in order. The steps are
functions of other files.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from molf.job.evaluated_data import warn_of_equal_data
from molf.job.inputs import Inputs
from molf.job.model.path import check_model, check_quantisation
from molf.job.progress import Reporter, make_reporter
from molf.job.record.directory import RunDirectory, check_fallback, check_output, locking_runs
from molf.job.record.result import RunResult
from molf.job.record.results import check_results
from molf.job.settings.resolved import ResolvedSettings, resolve
from molf.job.settings.settings import TrainSettings
from molf.job.settings.training_arguments import check_trackers, check_training_args
from molf.masking import learn
from molf.measure import read_plain_text
from molf.paths import check_inputs_outside
from molf.streams import ignoring_print_errors
from molf.tasks import Task

if TYPE_CHECKING:
    from molf.job.dry_run import DryRun

INPUTS = ("model", "data", "eval_data", "forgetting_data", "assignment")


def train(
    settings: TrainSettings, reporter: Reporter | None = None, inputs: Inputs | None = None
) -> RunResult:
    """Fine-tune a model, measure it before and after, and write the run directory.

    Args:
        settings: The options.
        reporter: Shows the progress; on standard error if not given.
        inputs: Returns task, base and the base's evaluation; loaded and measured if not given.

    Raises:
        InputError: The options, the data or the model are wrong. Nothing was written.
        RunError: The run failed; its directory holds the traceback.
    """
    started = datetime.now().astimezone()
    inputs = inputs or Inputs()
    with ignoring_print_errors() as errors:
        # Checked before torch and transformers are imported, which takes seconds.
        resolved = checked(settings, started)
        check_places(resolved)
        task, forgetting_text = open_data(resolved, inputs)

        from molf.job.libraries import quiet_libraries

        sources = (getattr(resolved, name) for name in INPUTS)
        with quiet_libraries(), locking_runs(sources):
            result = _train(
                resolved, task, forgetting_text, reporter or make_reporter(), inputs, started
            )
    return replace(result, print_error=str(errors[0])) if errors else result


def _train(
    settings: ResolvedSettings,
    task: Task,
    forgetting_text: str,
    reporter: Reporter,
    inputs: Inputs,
    started: datetime,
) -> RunResult:
    """Run a training, after its options, task and places were checked."""
    # These import torch, transformers, trl and peft.
    from molf.job.evaluating import Evaluator
    from molf.job.failing import failing_in
    from molf.job.memory import reset_peak_memory
    from molf.job.model.saving import SaveError
    from molf.job.opening import open_training
    from molf.job.records import ConfigRecord, add_row, input_files, run_result, write_evaluations
    from molf.job.trained_model import TrainedModel
    from molf.job.training import run_training

    # Open and check: nothing is written yet.
    opening = open_training(settings, task, inputs)
    settings, device = opening.settings, opening.arguments.device
    for note in opening.notes:
        reporter.say(note)
    files = input_files(settings, task)
    directory = RunDirectory(settings.output_dir, overwrite=settings.overwrite)
    with directory, failing_in(directory, reporter):
        record = ConfigRecord(opening, task, files, started)
        record.write(directory)

        # Measure the base.
        reset_peak_memory(device)
        if left_out := opening.data.samples.left_out:
            reporter.say(
                f"Left out: {left_out} of {len(task.training_samples)} examples "
                f"are longer than {settings.max_length} tokens."
            )
        evaluator = Evaluator(settings, task, forgetting_text, device, reporter)
        before = evaluator.base(opening.base, inputs)

        training = run_training(opening, directory, reporter)
        record.add_training(training)

        # Save before anything else: a file that cannot be written must not lose the training.
        trained = TrainedModel(opening, directory, task, training, before)
        try:
            saved = trained.save()
        except SaveError:
            with suppress(OSError):
                record.write(directory)
            raise
        record.add_saved(saved)
        record.write(directory)

        # Read the base once more, then load the saved model and compare it: one model at a time.
        base_logits = evaluator.base_logits(inputs)
        loaded = trained.load()
        after = evaluator.saved(loaded, base_logits)

        # Write the records.
        trained.write_card(loaded, after, saved)
        record.write(directory)  # once more: the directory may have been deleted since
        write_evaluations(directory, task, before, after)
        result = run_result(opening, directory, training, before, after, saved, evaluator.seconds)
        directory.complete()
    return replace(result, results=add_row(result, settings, started))


def dry_run(
    settings: TrainSettings, reporter: Reporter | None = None, inputs: Inputs | None = None
) -> DryRun:
    """Run the checks of `train` and two steps; nothing is written.

    Args:
        settings: The options.
        reporter: Shows the progress; on standard error if not given.
        inputs: Returns task and base; loaded if not given.

    Raises:
        InputError: The options, the data or the model are wrong.
    """
    inputs = inputs or Inputs()
    with ignoring_print_errors():
        resolved = checked(settings, datetime.now().astimezone())
        check_places(resolved)
        task, _ = open_data(resolved, inputs)

        from molf.job.libraries import quiet_libraries

        with quiet_libraries():
            from molf.job.dry_run import rehearse

            return rehearse(resolved, task, reporter or make_reporter(), inputs)


def checked(settings: TrainSettings, started: datetime) -> ResolvedSettings:
    """Check the options alone, and return them with all defaults resolved.

    Raises:
        InputError: An option is wrong or missing.
    """
    learn(vars(settings))
    check_trackers(settings.report_to)
    check_training_args(settings.training_args)
    return resolve(settings, started)


def check_places(settings: ResolvedSettings) -> None:
    """Check the paths of model and output.

    Raises:
        InputError: The model is missing, or the output directory cannot be used.
    """
    check_quantisation(settings)
    check_model(settings.model)
    if settings.assignment is not None:
        from molf.job.record.assignment_source import read_assignment_source  # imports pyarrow

        read_assignment_source(settings.assignment)
    check_output(settings.output_dir, overwrite=settings.overwrite)
    check_fallback(settings.fallback_dir)
    check_inputs_outside(settings.output_dir, {name: getattr(settings, name) for name in INPUTS})
    check_results(settings.output_dir.parent)


def open_data(settings: ResolvedSettings, inputs: Inputs) -> tuple[Task, str]:
    """Return the task with its records, and the plain text that forgetting is measured on.

    Raises:
        InputError: The data is missing or invalid.
    """
    task = inputs.task(settings.task_options)
    warn_of_equal_data(settings)
    if settings.forgetting_data is None:
        return task, task.default_forgetting_text()
    return task, read_plain_text(settings.forgetting_data)
