"""Demo tasks: records of the embedded world, whose facts the shipped base model has learned."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from molf import world
from molf.errors import InputError
from molf.tasks.base import Task
from molf.tasks.options import TaskOptions
from molf.tasks.questions import Splits


class QuestionLoader(Protocol):
    """The loader of a question task, such as `load_sql`."""

    def __call__(
        self,
        options: TaskOptions,
        splits: Splits,
        forgetting_text: Callable[[], str],
        groups: Sequence[Hashable] | None,
    ) -> Task:
        """Load the task from records by split; the validation part has whole groups of them."""


def load_demo_questions(
    options: TaskOptions,
    load: QuestionLoader,
    records: Callable[[world.World], Splits],
    groups: Callable[[world.World], Sequence[Hashable]] | None = None,
) -> Task:
    """Load a task with questions about the embedded world.

    Args:
        options: The options.
        load: Loader of the task.
        records: Function that returns the records by split.
        groups: Function that returns a key for each training record; the validation part has all
            records of a key or none. None for single records.

    Raises:
        InputError: The options name other data.
    """
    refuse_data(options)
    built = world.build_world()
    keys = None if groups is None else groups(built)
    return load(options, records(built), lambda: world.held_out_text(built), keys)


def refuse_data(options: TaskOptions) -> None:
    """Reject data for a task that has its own."""
    for name in ("data", "eval_data", "validation_data"):
        if getattr(options, name) is not None:
            raise InputError(
                f"{options.name} brings its own data: {name} cannot be given with it. Give the "
                "task of your data as well, such as --task custom."
            )
