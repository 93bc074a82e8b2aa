"""The tasks: data sets with prompts and metrics, loaded by name.

Loading imports neither torch nor transformers, so that wrong records are reported within seconds.
To add a task, write a file with a loader and add the loader to `_LOADERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from molf import world
from molf.errors import InputError
from molf.inputs import check_installed
from molf.tasks.base import Task
from molf.tasks.custom import load_custom
from molf.tasks.demo import load_demo_questions
from molf.tasks.facts import load_demo_fact, load_fact
from molf.tasks.math import load_math
from molf.tasks.med import load_med
from molf.tasks.options import EVAL_PARTS, FORMATS, VALIDATION_SHARE, TaskOptions
from molf.tasks.sql import load_sql

# Tasks that can show demonstrations before a question (`few_shot`).
_QUESTIONS: dict[str, Callable[[TaskOptions], Task]] = {
    "demo-sql": partial(
        load_demo_questions, load=load_sql, records=world.sql_records, groups=world.sql_groups
    ),
    "demo-forms": partial(
        load_demo_questions,
        load=load_sql,
        records=world.new_form_records,
    ),
    "demo-med": partial(load_demo_questions, load=load_med, records=world.med_records),
    "sql": load_sql,
    "med": load_med,
    "math": load_math,
}

_LOADERS: dict[str, Callable[[TaskOptions], Task]] = {
    "demo-fact": load_demo_fact,
    **_QUESTIONS,
    "fact": load_fact,
    "custom": load_custom,
}

# Tasks that compare queries, and the packages of the extra `sql` for it.
_SQL = ("sql", "demo-sql", "demo-forms")
_SQL_PACKAGES = ("sqlglot", "sacrebleu")

# Tasks whose answers can be made wrong (`label_noise`).
_NOISY = ("demo-med", "med")

TASKS: tuple[str, ...] = tuple(_LOADERS)

__all__ = [
    "EVAL_PARTS",
    "FORMATS",
    "TASKS",
    "VALIDATION_SHARE",
    "Task",
    "TaskOptions",
    "check_task",
    "load_task",
]


def load_task(options: TaskOptions) -> Task:
    """Read and check all records of a task.

    Args:
        options: Name of the task, and its data.

    Raises:
        InputError: There is no such task, or its data is missing, unreachable or invalid.
    """
    check_task(options)
    return _LOADERS[options.name](options)


def check_task(options: TaskOptions) -> None:
    """Check a task's options without reading any data.

    Raises:
        InputError: There is no such task, it does not support an option, or a package is missing.
    """
    if options.name not in _LOADERS:
        raise InputError(f"Unknown task {options.name!r}. Must be one of {', '.join(TASKS)}.")
    if options.name in _SQL:
        for package in _SQL_PACKAGES:
            check_installed(package, f"task={options.name}")
    if options.few_shot and options.name not in _QUESTIONS:
        raise InputError(
            f"Invalid few_shot={options.few_shot} with task={options.name}. "
            f"Must be 0; demonstrations are for {', '.join(_QUESTIONS)}."
        )
    if options.validation_data is not None and options.few_shot:
        raise InputError(
            f"Invalid few_shot={options.few_shot} with validation_data: demonstrations could be "
            "its records. Leave one of the two out; a part of data is set aside without "
            "validation_data."
        )
    if options.label_noise and options.name not in _NOISY:
        raise InputError(
            f"Invalid label_noise={options.label_noise} with task={options.name}. "
            f"Must be 0; wrong answers are for {', '.join(_NOISY)}."
        )
    if options.format is not None and options.name != "custom":
        raise InputError(
            f"Invalid format={options.format} with task={options.name}: the task has its own "
            "fields. Leave format out, or give --task custom."
        )
    if options.name == "demo-fact" and options.validation_share is not None:
        raise InputError(
            f"Invalid validation_share={options.validation_share} with task=demo-fact: its "
            "validation part has 200 other facts. Leave validation_share out."
        )
    if (
        options.name == "fact"
        and options.validates
        and options.eval_data is None
        and options.validation_share is None
    ):
        raise InputError(
            "Invalid eval_part=validation with task=fact and no validation_share: the requests "
            "that are trained are the measured ones, so each part needs its own. Give the same "
            "validation_share, such as 0.3, to the runs of both parts."
        )
