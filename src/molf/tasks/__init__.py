"""The tasks: data sets with prompts and metrics, loaded by name.

Loading imports neither torch nor transformers, so that wrong records are reported within seconds.
To add a task, write a file with a loader and add the loader to `_LOADERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from molf import world
from molf.errors import InputError
from molf.tasks.base import Task
from molf.tasks.custom import load_custom
from molf.tasks.demo import load_demo_questions
from molf.tasks.facts import load_demo_fact, load_fact
from molf.tasks.med import load_med
from molf.tasks.options import TaskOptions
from molf.tasks.sql import load_sql

# Tasks that can show demonstrations before a question (`few_shot`).
_QUESTIONS: dict[str, Callable[[TaskOptions], Task]] = {
    "demo-sql": partial(load_demo_questions, load=load_sql, records=world.sql_records),
    "demo-med": partial(load_demo_questions, load=load_med, records=world.med_records),
    "sql": load_sql,
    "med": load_med,
}

_LOADERS: dict[str, Callable[[TaskOptions], Task]] = {
    "demo-fact": load_demo_fact,
    **_QUESTIONS,
    "fact": load_fact,
    "custom": load_custom,
}

TASKS: tuple[str, ...] = tuple(_LOADERS)

__all__ = ["TASKS", "Task", "TaskOptions", "check_task", "load_task"]


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
        InputError: There is no such task, or it does not support an option.
    """
    if options.name not in _LOADERS:
        raise InputError(f"Unknown task {options.name!r}. Must be one of {', '.join(TASKS)}.")
    if options.few_shot and options.name not in _QUESTIONS:
        raise InputError(
            f"Invalid few_shot={options.few_shot} with task={options.name}. "
            f"Must be 0; demonstrations are for {', '.join(_QUESTIONS)}."
        )
