"""Open a short training that keeps no model: a probe, or a range test of rates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from molf.errors import InputError
from molf.job.inputs import Inputs
from molf.job.progress import Reporter, make_reporter
from molf.job.record.directory import RunDirectory, locking_runs
from molf.job.record.ownership import A_RUN, Ownership
from molf.job.run import checked, import_libraries, input_places, open_data
from molf.job.settings.during import BY_LOSS
from molf.job.settings.resolved import ResolvedSettings
from molf.job.settings.settings import TrainSettings
from molf.streams import ignoring_print_errors
from molf.tasks import Task

if TYPE_CHECKING:
    from molf.job.opening import Opening


@dataclass(frozen=True)
class ShortTraining:
    """A short training that was checked and opened.

    Attributes:
        opening: The checked training with its model and data.
        task: The task with its records.
        files: The record of the input files.
        directory: The output directory.
        reporter: Shows the progress.
        started: Time of the start.
    """

    opening: Opening
    task: Task
    files: dict[str, Any]
    directory: RunDirectory
    reporter: Reporter
    started: datetime
    _settings: ResolvedSettings
    _inputs: Inputs

    def reopened(self) -> Opening:
        """Return a new opening with the same weights, examples and adapter."""
        from molf.job.opening import open_training

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given for the first opening
            return open_training(self._settings, self.task, self._inputs, self.reporter)


@contextmanager
def short_training(
    settings: TrainSettings,
    name: str,
    reporter: Reporter | None,
    inputs: Inputs | None,
    ownership: Ownership = A_RUN,
) -> Iterator[ShortTraining]:
    """Check the options, open the training, and make and lock its directory during the block.

    The block completes the directory. An error in it is recorded there.

    Args:
        settings: The options.
        name: Replaces the method's name in the default output directory.
        reporter: Shows the progress; on standard error if None.
        inputs: Returns task and base; loaded if None.
        ownership: The kind of directory that is written, and that `overwrite` replaces.

    Raises:
        InputError: The options, the data or the model are wrong, or no step would have a learning
            rate above 0. Nothing was written.
        RunError: The block failed; the directory holds the traceback.
    """
    started = datetime.now().astimezone()
    inputs = inputs or Inputs()
    with ignoring_print_errors():
        # Checked before torch and transformers are imported, which takes seconds.
        resolved = checked(settings, started)
        if settings.output_dir is None:
            path = resolved.output_dir
            path = path.with_name(path.name.replace(f"-{settings.method}-", f"-{name}-", 1))
            resolved = replace(resolved, output_dir=path)
        reporter = reporter or make_reporter()
        task, _ = open_data(resolved, inputs, reporter, ownership)
        import_libraries(reporter)

        from molf.job.libraries import quiet_libraries

        with quiet_libraries(), locking_runs(input_places(resolved)):
            from molf.job.failing import failing_in
            from molf.job.opening import open_training
            from molf.job.records import input_files

            opening = open_training(resolved, task, inputs, reporter)
            _check_moves(opening, name)
            for note in opening.notes:
                reporter.say(note)
            files = input_files(opening.settings, task)
            directory = RunDirectory(
                resolved.output_dir, overwrite=resolved.overwrite, ownership=ownership
            )
            with directory, failing_in(directory, reporter):
                yield ShortTraining(
                    opening, task, files, directory, reporter, started, resolved, inputs
                )


def _check_moves(opening: Opening, name: str) -> None:
    """Refuse a training in which each step has the learning rate 0, which decides nothing.

    Raises:
        InputError: With the number of steps and the warm-up.
    """
    import torch
    from transformers import get_scheduler

    arguments, steps = opening.arguments, opening.data.steps
    if arguments.lr_scheduler_type in BY_LOSS:
        return  # these begin at the full rate
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    # As the trainer makes it.
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    for _ in range(steps):
        if optimizer.param_groups[0]["lr"] > 0:
            return
        optimizer.step()
        scheduler.step()
    raise InputError(
        f"Invalid max_steps={steps} with warmup_ratio={opening.settings.warmup_ratio:g}: a warm-up "
        f"begins at rate 0, and no step of the {name} has a rate above 0. Give --max_steps 2 or "
        "more, or --warmup_ratio 0."
    )
