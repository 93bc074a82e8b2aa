"""Run a training, or a dry run, from its options."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from molf.job.inputs import Inputs
from molf.job.model.path import check_model, check_quantisation
from molf.job.progress import Reporter, make_reporter
from molf.job.record.directory import check_fallback, check_output, locking_runs
from molf.job.record.result import RunResult
from molf.job.record.results import check_results
from molf.job.settings.resolved import ResolvedSettings, resolve
from molf.job.settings.settings import TrainSettings
from molf.job.settings.training_arguments import check_trackers, check_training_args
from molf.job.training_data import warn_of_equal_data
from molf.masking import learn
from molf.measure import read_plain_text
from molf.paths import check_inputs_outside
from molf.streams import ignoring_print_errors
from molf.tasks import Task

if TYPE_CHECKING:
    from molf.job.dry_run import DryRun

_INPUTS = ("model", "data", "eval_data", "forgetting_data")


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
        resolved, task, forgetting_text = _opened(settings, started, inputs)

        from molf.job.libraries import quiet_libraries

        sources = (getattr(resolved, name) for name in _INPUTS)
        with quiet_libraries(), locking_runs(sources):
            from molf.job.job import run_job

            reporter = reporter or make_reporter()
            result = run_job(resolved, task, forgetting_text, reporter, started, inputs)
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
    inputs = inputs or Inputs()
    with ignoring_print_errors():
        resolved, task, _ = _opened(settings, datetime.now().astimezone(), inputs)

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


def _opened(
    settings: TrainSettings, started: datetime, inputs: Inputs
) -> tuple[ResolvedSettings, Task, str]:
    """Check options, model, output directory and data; return settings, task and plain text."""
    resolved = checked(settings, started)
    check_quantisation(resolved)
    check_model(resolved.model)
    check_output(resolved.output_dir, overwrite=resolved.overwrite)
    check_fallback(resolved.fallback_dir)
    check_inputs_outside(resolved.output_dir, {name: getattr(resolved, name) for name in _INPUTS})
    check_results(resolved.output_dir.parent)
    task = inputs.task(resolved.task_options)
    warn_of_equal_data(resolved)
    if resolved.forgetting_data is None:
        return resolved, task, task.default_forgetting_text()
    return resolved, task, read_plain_text(resolved.forgetting_data)
