"""The validation part of a task's training data (`eval_part="validation"`).

Rates and other settings are chosen on it, so that the test records stay unseen. It depends on the
data and `validation_share` alone, not on the seed of a run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace

from molf.data.selection import content_key, draw, validation_part
from molf.errors import InputError
from molf.tasks.base import DataRecords, Task
from molf.tasks.options import TaskOptions


def split_for_validation(
    options: TaskOptions,
    indices: Sequence[int],
    content: Callable[[int], Hashable],
    tested: Collection[Hashable] | None,
    data: str,
    group: Callable[[int], Hashable] | None = None,
) -> tuple[list[int], list[int]]:
    """Split the training records into those to train on and the validation part.

    A record of the part that has the content of a test record is in neither.

    Args:
        options: The options of the task, with `eval_part="validation"`.
        indices: The usable records of the training data.
        content: Returns a key of a record's texts, equal for equal texts.
        tested: The contents of the records that runs with `eval_part="test"` measure; None if
            these runs hold out records of `data` by their seeds.
        data: The training data, for messages.
        group: Returns a key of a record; records of equal keys stay together. None for `content`.

    Raises:
        InputError: The part could contain test records, or one of the two sides is empty.
    """
    if tested is None and not options.evaluation_only:
        raise InputError(
            f"Invalid eval_part=validation with data={data}: its test records are held out by the "
            "seed of each run, so that any record may be one. Give eval_data, or a folder with "
            "test records."
        )
    rest, drawn = validation_part(indices, options.part_share, group or content)
    known = set(tested or ())
    part = [index for index in drawn if content(index) not in known]
    if not part or not rest:
        side = "to train on" if part else "in the validation part"
        raise InputError(
            f"Invalid eval_part=validation with data={data}: of {len(indices)} records, none is "
            f"left {side} (validation_share {options.part_share:g}). Give more records, or "
            "another validation_share."
        )
    return rest, part


def with_validation(task: Task, options: TaskOptions, load: Callable[[TaskOptions], Task]) -> Task:
    """Return the task with samples to measure while it trains; `task` itself is not changed.

    They are the records of `validation_data`, or else a part of the training samples, which are
    then not trained on: that share of the different contents which `eval_part="validation"` would
    draw from these samples, without measured records, so that nothing is chosen by those. Measured
    records that are trained on without evaluations, such as the requests of `fact`, stay so.

    Args:
        task: The task.
        options: Its options; `max_eval_samples` limits these samples as well.
        load: Loads a task, as `molf.tasks.load_task`.

    Raises:
        InputError: No record is left to train on, or to measure.

    Warns:
        UserWarning: Records of `validation_data` are left out.
    """
    if options.validation_data is None:
        return _set_aside(task, options)
    return _with_other_records(task, options, load)


def _set_aside(task: Task, options: TaskOptions) -> Task:
    samples = task.training_samples
    _, drawn = validation_part(
        range(len(samples)), options.part_share, lambda index: samples[index].content
    )
    measured = {sample.content for sample in task.evaluated_samples(task.evaluation_count)}
    part = [index for index in drawn if samples[index].content not in measured]
    apart = set(part)
    rest = [index for index in range(len(samples)) if index not in apart]
    if not part and drawn:
        # Demo tasks have no other data.
        way = "Leave" if options.name.startswith("demo-") else "Give --eval_data, or leave"
        raise InputError(
            f"task {options.name} measures the records that it trains on, so that none is left for "
            f"evaluations during the training. {way} out --eval_steps and --eval_strategy."
        )
    if not rest or not part:
        raise InputError(
            f"Of {len(samples)} records, none is left to train on beside the validation part "
            f"(validation_share {options.part_share:g}). Give more records, or another "
            "validation_share."
        )
    return task.with_part(rest, part, draw(part, options.max_eval_samples, options.seed))


def _with_other_records(
    task: Task, options: TaskOptions, load: Callable[[TaskOptions], Task]
) -> Task:
    """Return the task with the records of `validation_data` that it neither trains nor measures."""
    given = options.validation_data
    other = load(
        replace(
            options,
            data=None,
            eval_data=given,
            eval_option="validation_data",
            validation_data=None,
            max_samples=None,
            max_eval_samples=None,
            eval_part="test",
            evaluation_only=True,
        )
    )
    # With the right answers: a question that is trained with a wrong one is trained on as well.
    trained = load(replace(options, label_noise=0.0)) if options.label_noise else task
    known = {content_key(sample.content) for sample in trained.training_samples}
    measured = task.evaluated_samples(task.evaluation_count)
    known |= {content_key(sample.content) for sample in measured}
    samples = other.evaluated_samples(other.evaluation_count)
    usable = [one for one in samples if content_key(one.content) not in known]
    if left_out := len(samples) - len(usable):
        fault = (
            f"validation_data {given}: {left_out} of {len(samples)} records are also trained on, "
            "or measured before and after the training"
        )
        if not usable:
            raise InputError(f"{fault}. Give others.")
        warnings.warn(f"{fault}; they are left out.", stacklevel=3)
    found = copy.copy(task)
    chosen = draw(range(len(usable)), options.max_eval_samples, options.seed)
    found.validation_samples = [usable[position] for position in chosen]
    return found


def records_with_validation(
    task: Task, options: TaskOptions, load: Callable[[TaskOptions], Task]
) -> DataRecords:
    """Return the records of a task's training file, with those that `with_validation` sets aside.

    The arguments and errors are those of `with_validation`.
    """
    found = with_validation(task, options, load)
    data = found.data_records()
    rest = {sample.record for sample in found.training_samples}
    return replace(
        data,
        trained_on=[index for index in data.trained_on if index in rest],
        validated_on=[index for index in dict.fromkeys(data.trained_on) if index not in rest],
    )


def part_record(options: TaskOptions, part: Sequence[int], data: str) -> dict[str, str]:
    """Return the description of a validation part of that many records, for the run's files."""
    return {
        "evaluated_on": f"{len(part)} records of the validation part of {data} "
        f"(share {options.part_share:g})",
        "eval_part": options.eval_part,
        "validation_share": f"{options.part_share:g}",
    }
