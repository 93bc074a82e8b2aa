"""Run a training, or a dry run, from its options.

`train` and `_train` are a run from its first check to its last record, in order. The steps are
functions of other files.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molf.amounts import decimal_size
from molf.data.records import data_files
from molf.data.sources import OPTIONS as SOURCES
from molf.data.sources import places
from molf.errors import InputError
from molf.job.evaluated_data import warn_of_trained_records
from molf.job.inputs import Inputs
from molf.job.model.path import check_model, check_quantisation
from molf.job.progress import Reporter, make_reporter
from molf.job.record.directory import (
    RunDirectory,
    check_fallback,
    check_output,
    locking_runs,
    open_directory,
)
from molf.job.record.ownership import (
    A_RUN,
    CHECKPOINTS,
    ENVIRONMENT,
    MODEL,
    Ownership,
    read_json,
)
from molf.job.record.result import FinishedError, RunResult
from molf.job.record.results import check_results
from molf.job.record.resumed_run import (
    check_same_contents,
    check_same_options,
    is_finished,
    is_started,
)
from molf.job.settings.during import eval_strategy_of
from molf.job.settings.resolved import ResolvedSettings, resolve
from molf.job.settings.settings import TrainSettings
from molf.job.settings.sharding import check_launcher, shards
from molf.job.settings.training_arguments import check_trackers, check_training_args
from molf.masking import learn
from molf.paths import check_inputs_outside, is_within
from molf.ranks import Ranks, check_alone, launched_count, ranks
from molf.streams import ignoring_print_errors
from molf.tasks import Task
from molf.tasks.validation import with_validation

if TYPE_CHECKING:
    from molf.job.dry_run import DryRun
    from molf.job.evaluating import Evaluator
    from molf.job.opening import Opening
    from molf.job.record.stages import Stages
    from molf.measure import Evaluation

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
            result = _train(resolved, task, forgetting_text, reporter, inputs, started)
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
    from molf.job.memory import peak_memory, reset_peak_memory
    from molf.job.model.saving import SaveError
    from molf.job.record.stages import Stages
    from molf.job.records import ConfigRecord, add_row, run_result, write_evaluations
    from molf.job.trained_model import TrainedModel
    from molf.job.trainer.tracking import tracking_of
    from molf.job.training import Training, run_training

    # Open and check: nothing is written yet.
    opening, files = _open(settings, task, inputs, reporter)
    processes = ranks()  # connected by `_open`
    on_main = processes.on_main
    settings, device = opening.settings, opening.arguments.device
    directory = open_directory(
        processes, settings.output_dir, overwrite=settings.overwrite, resume=settings.resume
    )
    if settings.resume and not directory.is_resumed:
        reporter.say(f"There is no run in {directory.path} to resume: a new one begins.")
    with (
        directory,
        failing_in(directory, reporter),
        tracking_of(
            opening.arguments, directory / CHECKPOINTS, is_main=processes.is_main
        ) as tracking,
    ):
        stages = Stages(directory, settings)
        earlier = read_json(directory / ENVIRONMENT) if directory.is_resumed else None
        record = ConfigRecord(opening, task, files, started, earlier)
        on_main(lambda: record.write(directory))

        # Open the trackers first: one without a login, for example, ends the run here.
        on_main(lambda: stages.keep_trackers(tracking.open(stages.trackers)))

        # Measure the base.
        reset_peak_memory(device)
        evaluator = Evaluator(settings, task, forgetting_text, device, reporter, opening.sharding)
        before = _base_evaluation(stages, evaluator, opening, inputs)

        done = on_main(lambda: stages.saved)
        if done is None:
            checkpoint = on_main(lambda: _newest(directory, reporter))
            training = run_training(
                opening,
                directory,
                reporter,
                checkpoint=checkpoint,
                tracking=tracking,
                before=before,
            )
        else:
            reporter.say(f"Resuming {directory.path}: the model is trained and saved.")
            training = Training.of_record(done[0])
        record.add_training(training)

        # Save before anything else: a file that cannot be written must not lose the training.
        trained = TrainedModel(opening, directory, task, training, before)
        if done is None:
            try:
                with reporter.working("Saving the model"):
                    saved = on_main(trained.save)
            except SaveError:
                with suppress(OSError):
                    on_main(lambda: record.write(directory))
                raise
            on_main(lambda: stages.keep_saved(training.record(), saved))
        else:
            saved = done[1]
        trained.free()
        record.add_saved(saved)
        on_main(lambda: record.write(directory))

        # Read the base once more, then load the saved model and compare it: one model at a time.
        base_logits = evaluator.base_logits(inputs)
        directory.path = on_main(lambda: (directory / MODEL).parent)  # it may have been moved
        loaded = trained.load()
        after = evaluator.saved(loaded, base_logits)

        tracking.add_evaluation("after", after, training.steps)

        # Write the records.
        def write() -> RunResult:
            trained.write_card(loaded, after, saved)
            memory = peak_memory(device)
            record.add_costs(training.seconds, memory)
            record.write(directory)  # once more: the directory may have been deleted since
            write_evaluations(directory, task, before, after)
            result = run_result(
                opening, directory, training, before, after, saved, evaluator.seconds, memory
            )
            directory.complete()
            result = replace(result, results=add_row(result, settings, started, record.identity))
            stages.clear()
            return result

        return on_main(write)


def _open(
    settings: ResolvedSettings, task: Task, inputs: Inputs, reporter: Reporter
) -> tuple[Opening, dict[str, Any]]:
    """Open the training, and show its overview; return it and the record of its input files."""
    from molf.job.opening import open_training
    from molf.job.overview import overview
    from molf.job.records import input_files

    opening = open_training(settings, task, inputs, reporter)
    processes = ranks()
    opening.settings = replace(opening.settings, output_dir=_agreed(opening, processes))
    files = input_files(opening.settings, task)
    if settings.resume:
        processes.on_main(lambda: check_same_contents(opening.settings, files))
    for line in (*overview(opening, task, processes.count), *opening.notes):
        reporter.say(line)
    return opening, files


def _base_evaluation(
    stages: Stages, evaluator: Evaluator, opening: Opening, inputs: Inputs
) -> Evaluation:
    """Return the evaluation of the base; a resumed run measures it only if it was not kept."""
    on_main = ranks().on_main
    kept = on_main(lambda: stages.before)
    if kept is not None:
        evaluator.seconds += on_main(lambda: stages.evaluation_seconds)
        return kept
    measured = evaluator.base(opening.base, inputs)
    on_main(lambda: stages.keep_before(measured, evaluator.seconds))
    return measured


def _agreed(opening: Opening, processes: Ranks) -> Path:
    """Wait until all processes have opened the training; return rank 0's output directory.

    Raises:
        InputError: Another process has other examples.
    """
    from molf.job.trainer.run_parts import hash_of_rows

    examples = hash_of_rows(opening.data) if processes.count > 1 else ""
    found = processes.gather((opening.settings.output_dir, examples))
    differing = [rank for rank, (_, those) in enumerate(found) if those != found[0][1]]
    if differing:
        raise InputError(
            f"The examples of rank {differing[0]} differ from those of rank 0: --data or the "
            "tokenizer is not the same on all machines."
        )
    return found[0][0]  # its default has the time in it


def _newest(directory: RunDirectory, reporter: Reporter) -> Path | None:
    """Return the newest checkpoint of a resumed run, and show where it continues."""
    from molf.checkpoint.store import newest_checkpoint

    if not directory.is_resumed:
        return None
    found = newest_checkpoint(directory / CHECKPOINTS)
    if found is None:
        reporter.say(
            f"{directory.path} has no complete checkpoint: the training starts from the beginning."
        )
    else:
        reporter.say(f"Resuming {directory.path} from {found.name}.")
    return found


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
