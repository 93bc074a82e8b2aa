"""Run a training, or a dry run, from its options.

`train` has the checks before torch is imported. The steps after them are in `run_steps`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from molf.amounts import decimal_size
from molf.data.records import data_files
from molf.data.sources import OPTIONS as SOURCES
from molf.data.sources import places
from molf.errors import InputError
from molf.job.evaluated_data import warn_of_trained_records
from molf.job.inputs import Inputs
from molf.job.model.path import check_model, check_quantisation
from molf.job.progress import Reporter, make_reporter
from molf.job.record.directory import check_fallback, check_output, locking_runs
from molf.job.record.ownership import A_RUN, Ownership
from molf.job.record.result import FinishedError, RunResult
from molf.job.record.results import check_results
from molf.job.record.resumed_run import check_same_options, is_finished, is_started
from molf.job.settings.during import eval_strategy_of
from molf.job.settings.resolved import ResolvedSettings, resolve
from molf.job.settings.settings import TrainSettings
from molf.job.settings.sharding import check_launcher, shards
from molf.job.settings.training_arguments import check_trackers, check_training_args
from molf.masking import learn
from molf.paths import check_inputs_outside, is_within
from molf.ranks import check_alone, launched_count
from molf.streams import ignoring_print_errors
from molf.tasks import Task
from molf.tasks.validation import with_validation

if TYPE_CHECKING:
    from molf.job.dry_run import DryRun

_LARGE = 10_000_000  # bytes of data that are announced
_IMPORTING = 1.5  # seconds of imports, after which a log has a line about them
_INPUTS = ("model", *SOURCES, "forgetting_data", "assignment")


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
        FinishedError: The run to resume is complete.
        StoppedError: A signal stopped the training; a resumed run continues it.
        RunError: The run failed; its directory holds the traceback.
    """
    started = datetime.now().astimezone()
    inputs = inputs or Inputs()
    with ignoring_print_errors() as errors:
        # Checked before torch and transformers are imported, which takes seconds.
        resolved = checked(settings, started)
        if resolved.resume:
            _check_resumed(resolved)
        reporter = reporter or make_reporter()
        task, forgetting_text = open_data(resolved, inputs, reporter)
        import_libraries(reporter)

        from molf.job.libraries import quiet_libraries

        with quiet_libraries(), locking_runs(input_places(resolved)):
            from molf.job.run_steps import run_checked

            result = run_checked(resolved, task, forgetting_text, reporter, inputs, started)
    return replace(result, print_error=str(errors[0])) if errors else result


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
    check_alone("dry_run")
    inputs = inputs or Inputs()
    with ignoring_print_errors():
        resolved = checked(settings, datetime.now().astimezone())
        reporter = reporter or make_reporter()
        task, _ = open_data(resolved, inputs, reporter)
        import_libraries(reporter)

        from molf.job.libraries import quiet_libraries

        with quiet_libraries():
            from molf.job.dry_run import rehearse

            return rehearse(resolved, task, reporter, inputs)


def checked(settings: TrainSettings, started: datetime) -> ResolvedSettings:
    """Check the options alone, and return them with all defaults resolved.

    Raises:
        InputError: An option is wrong or missing.
    """
    learn(vars(settings))
    check_trackers(settings.report_to)
    check_training_args(settings.training_args)
    check_launcher()
    shards(settings.fsdp, launched_count())
    return resolve(settings, started)


def _check_resumed(settings: ResolvedSettings) -> None:
    """Check that a run can be resumed with these options.

    Raises:
        InputError: An option would make it another training, or the directory is no run.
        FinishedError: It is complete.
    """
    path = settings.output_dir
    if not is_started(path):
        return
    check_same_options(settings)
    if is_finished(path):
        raise FinishedError(f"{path} is complete: there is nothing to resume.")


def _check_places(settings: ResolvedSettings, ownership: Ownership) -> None:
    """Check the paths of model and output.

    Raises:
        InputError: The model is missing, or the output directory cannot be used.
    """
    check_quantisation(settings)
    check_model(settings.model)
    if settings.assignment is not None:
        from molf.job.record.assignment_source import source_for  # imports pyarrow

        source_for(settings)
    check_output(
        settings.output_dir,
        overwrite=settings.overwrite,
        resume=settings.resume,
        ownership=ownership,
    )
    check_fallback(settings.fallback_dir)
    _check_token_cache(settings)
    for name, sources in _places(settings).items():
        for source in sources:
            check_inputs_outside(settings.output_dir, {name: source})
    check_results(settings.output_dir.parent)


def _announce_reading(settings: ResolvedSettings, reporter: Reporter) -> None:
    """Print a line before large data is read, which takes seconds."""
    if settings.data is not None:
        size = sum(path.stat().st_size for path in data_files(settings.data))
        if size > _LARGE:
            reporter.say(f"Reading {settings.data} ({decimal_size(size)})")


def _check_token_cache(settings: ResolvedSettings) -> None:
    folder = settings.token_cache
    if folder is None:
        return
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"token_cache {folder} is not a directory. Give one, or a new name.")
    if is_within(folder, settings.output_dir):
        raise InputError(
            f"token_cache {folder} lies in output_dir {settings.output_dir}, which --overwrite "
            "would delete. Give a folder beside it."
        )
    for name in SOURCES:
        for place in places(getattr(settings, name)):
            if os.path.isdir(place) and is_within(folder, Path(place)):
                raise InputError(
                    f"token_cache {folder} lies in {name} {place}, whose files are all read as "
                    "records. Give a folder beside it."
                )


def _places(settings: ResolvedSettings) -> dict[str, list[str]]:
    """Return the places of the inputs by option."""
    return {name: places(getattr(settings, name)) for name in _INPUTS}


def input_places(settings: ResolvedSettings) -> list[str]:
    """Return the places of all inputs."""
    return [place for places in _places(settings).values() for place in places]


def import_libraries(reporter: Reporter) -> None:
    """Import torch, transformers and TRL, and show that."""
    # 5 CPU seconds. PEFT takes 0.1 of them, and 1 with bitsandbytes and torchao, which it imports.
    # It cannot be left out for methods without an adapter: `transformers.trainer_utils` imports it
    # wherever it is installed.
    with reporter.working("Loading torch, transformers and TRL", after=_IMPORTING):
        from molf.job.libraries import quiet_libraries

        with quiet_libraries():
            import molf.job.training  # noqa: F401


def open_data(
    settings: ResolvedSettings, inputs: Inputs, reporter: Reporter, ownership: Ownership = A_RUN
) -> tuple[Task, str]:
    """Check the paths of model and output, and read the data.

    Args:
        settings: The settings.
        inputs: Returns the task.
        reporter: Shows the progress.
        ownership: The kind of directory that is written, and that `overwrite` replaces.

    Returns:
        The task with its records, and the plain text that forgetting is measured on.

    Raises:
        InputError: The model or the data is missing or invalid, or the output directory cannot be
            used.
    """
    _check_places(settings, ownership)
    _announce_reading(settings, reporter)
    task = inputs.task(settings.task_options)
    if eval_strategy_of(settings) != "no":
        task = with_validation(task, settings.task_options, inputs.task)
    warn_of_trained_records(task)
    return task, task.forgetting_text(settings.forgetting_data)
