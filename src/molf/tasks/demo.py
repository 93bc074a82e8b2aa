"""Demo tasks: records of the embedded world, which the shipped base model knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from molf import world
from molf.errors import InputError
from molf.tasks.base import Task
from molf.tasks.options import TaskOptions
from molf.tasks.questions import Splits


class QuestionLoader(Protocol):
    """Loads a task that asks questions, such as `load_sql`."""

    def __call__(
        self, options: TaskOptions, splits: Splits, forgetting_text: Callable[[], str]
    ) -> Task:
        """Load the task from records by split."""


def load_demo_questions(
    options: TaskOptions, load: QuestionLoader, records: Callable[[world.World], Splits]
) -> Task:
    """The task that asks about the embedded world.

    Args:
        options: The options.
        load: The loader of the task that the records are made for.
        records: Makes the records, by split.

    Raises:
        InputError: The options bring other data.
    """
    refuse_data(options)
    built = world.build_world()
    return load(options, records(built), lambda: world.held_out_text(built))


def refuse_data(options: TaskOptions) -> None:
    """Refuse data for a task that has its own."""
    for name in ("data", "eval_data"):
        if getattr(options, name) is not None:
            raise InputError(f"{options.name} brings its own data: {name} cannot be given with it.")
