"""The options that a task is loaded with."""

from __future__ import annotations

from dataclasses import dataclass

from molf.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """A task's name and data.

    Attributes:
        name: One of `molf.tasks.TASKS`.
        data: Records to train on: a file, a folder of files, a Hub id or a URL. None for the task's
            own data.
        eval_data: Records to evaluate on, given in the same ways. None lets the task choose.
        max_samples: Number of records of `data` to use, drawn by `seed`; None for all.
        max_eval_samples: Number of records to evaluate on, drawn by `seed`; None for all.
        few_shot: Number of training records with answers before each question, drawn by `seed`,
            in training and in evaluation (`sql`, `med` and their demo tasks).
        seed: Seed of all draws of records.
        evaluation_only: Train on nothing; evaluate all of `eval_data`, or else of `data`.
        preview: Only show the records: a single record is accepted and not held out.
    """

    name: str
    data: str | None = None
    eval_data: str | None = None
    max_samples: int | None = None
    max_eval_samples: int | None = None
    few_shot: int = 0
    seed: int = 0
    evaluation_only: bool = False
    preview: bool = False

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"Invalid {name}={value}. Must be at least 1.")
        if self.few_shot < 0:
            raise InputError(f"Invalid few_shot={self.few_shot}. Must be at least 0.")
