"""The options that a task is loaded with."""

from __future__ import annotations

from dataclasses import dataclass

from molf.errors import InputError

EVAL_PARTS = ("test", "validation")
"""Records to measure: those of the task, or a part of its training data."""

VALIDATION_SHARE = 0.2
"""Share of the training data in the validation part where none is given."""


FORMATS = ("messages", "sharegpt", "prompt-completion", "alpaca", "text")
"""Formats of the records of task custom."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """A task's name and data.

    Attributes:
        name: One of `molf.tasks.TASKS`.
        data: Records to train on: a file, a folder of files, a Hub id, a URL, `-` for standard
            input, or several of these, separated by commas. None for the task's own data.
        eval_data: Records to evaluate on, given in the same ways. None lets the task choose.
        validation_data: Records to measure while a task trains, given in the same ways. None sets
            a part of the training records aside (`molf.tasks.validation.with_validation`).
        eval_option: The option that `eval_data` was given by.
        format: The format of the records, one of `FORMATS` (`custom`); None to recognise that of
            each file.
        max_samples: Number of records of `data` to use, drawn by `seed`; None for all.
        max_eval_samples: Number of records to evaluate on, drawn by `seed`; None for all.
        few_shot: Number of training records with answers before each question, drawn by `seed`,
            in training and in evaluation (`sql`, `med`, `math` and the demo tasks of questions).
        eval_part: One of `EVAL_PARTS`. `validation` measures a fixed part of the training data,
            which is neither trained on nor measured with `test`.
        validation_share: Share of the training data in the validation part, in (0, 1); None for
            `VALIDATION_SHARE`. `fact` without `eval_data` sets the part aside in both parts, and
            has none by default.
        label_noise: Share of the training records that get a wrong answer, drawn by `seed`, in
            [0, 1) (`med` and its demo task).
        seed: Seed of all draws of records.
        evaluation_only: Train on nothing; evaluate all of `eval_data`, or else of `data`.
        preview: Only show the records: a single record is accepted and not held out.
    """

    name: str
    data: str | None = None
    eval_data: str | None = None
    validation_data: str | None = None
    eval_option: str = "eval_data"
    format: str | None = None
    max_samples: int | None = None
    max_eval_samples: int | None = None
    few_shot: int = 0
    eval_part: str = "test"
    validation_share: float | None = None
    label_noise: float = 0.0
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
        if self.format not in (None, *FORMATS):
            raise InputError(
                f"Invalid format={self.format!r}. Must be one of {', '.join(FORMATS)}."
            )
        if self.eval_part not in EVAL_PARTS:
            raise InputError(
                f"Invalid eval_part={self.eval_part!r}. Must be one of {', '.join(EVAL_PARTS)}."
            )
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise InputError(
                f"Invalid validation_share={self.validation_share}. Must be above 0 and below 1."
            )
        if not 0 <= self.label_noise < 1:
            raise InputError(f"Invalid label_noise={self.label_noise}. Must be in [0, 1).")

    def evaluation_splits(self, usual: tuple[str, ...] = ("test", "validation")) -> tuple[str, ...]:
        """Return the splits of evaluation records, the preferred one first.

        Args:
            usual: The result for `data` and `eval_data`.
        """
        # A step that is chosen by test records would make their figures too good.
        return ("validation", "test") if self.eval_option == "validation_data" else usual

    @property
    def validates(self) -> bool:
        """Whether the validation part is measured."""
        return self.eval_part == "validation"

    @property
    def part_share(self) -> float:
        """The share of the training data in the validation part."""
        return VALIDATION_SHARE if self.validation_share is None else self.validation_share
