"""The options of `molf eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from molf.errors import InputError
from molf.job.settings.converters import words
from molf.job.settings.ranges import BELOW_2_32, NOT_NEGATIVE, POSITIVE, Range, check_ranges
from molf.job.settings.settings import DATA, EVALUATION, OUTPUT
from molf.measure.harness import PREFIX
from molf.paths import expanded
from molf.tasks import EVAL_PARTS, FORMATS, TASKS, VALIDATION_SHARE, TaskOptions, check_task

_TWO = Range(lambda value: value >= 2, "at least 2")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """The options of `molf eval`."""

    task: Annotated[
        tuple[str, ...],
        Parameter(
            name=("--task", "--tasks"),
            converter=words,
            n_tokens=1,
            group=DATA,
            help=f"Tasks to measure, separated by commas: {', '.join(TASKS)}, or {PREFIX}NAME "
            "for a task of lm-evaluation-harness.",
        ),
    ]
    data: Annotated[str | None, Parameter(group=DATA)] = None
    """Records to evaluate on: a file, a folder, a URL, a Hub id, or - for standard input."""
    format: Annotated[
        str | None, Parameter(choices=FORMATS, group=DATA, show_default="by the first record")
    ] = None
    """Format of the records of custom."""
    max_samples: Annotated[int | None, Parameter(group=DATA), POSITIVE] = None
    """Evaluate on at most this many records, drawn by the seed."""
    few_shot: Annotated[int | None, Parameter(group=DATA, show_default="0"), NOT_NEGATIVE] = None
    """Answered training questions before each question (sql, med, math, demo-sql, -forms, -med)."""
    eval_part: Annotated[str, Parameter(choices=EVAL_PARTS, group=DATA)] = "test"
    """test: measure the task's records; validation: the validation part of the training data."""
    validation_share: Annotated[
        float | None, Parameter(group=DATA, show_default=f"{VALIDATION_SHARE:g}")
    ] = None
    """Share of the training data in the validation part (fact: set aside from both parts)."""
    max_length: Annotated[int, Parameter(group=DATA), _TWO] = 1024
    """Longest text in tokens; longer ones are left out and counted."""
    split_special_tokens: Annotated[bool, Parameter(group=DATA)] = False
    """Treat control tokens in the records' texts (such as </s>) as plain text."""
    forgetting_data: Annotated[str | None, Parameter(group=EVALUATION)] = None
    """Plain text to measure forgetting: its loss; default: a text of the task."""
    base: Annotated[str | None, Parameter(group=EVALUATION, show_default="that of its run")] = None
    """The model that the measured one was tuned from, for kl_neutral and kl_task."""
    predictions: Annotated[Path | None, Parameter(group=EVALUATION)] = None
    """Score these saved texts instead of a model: JSONL of {"index": i, "prediction": text}."""
    per_device_eval_batch_size: Annotated[int, Parameter(group=EVALUATION), POSITIVE] = 32
    """Examples per forward pass."""
    seed: Annotated[int, Parameter(group=EVALUATION), NOT_NEGATIVE, BELOW_2_32] = 42
    """Seed of the draw of records and of the intervals."""
    output_dir: Annotated[Path | None, Parameter(group=OUTPUT)] = None
    """Write eval.json and the predictions here."""
    overwrite: Annotated[bool, Parameter(group=OUTPUT)] = False
    """Replace an earlier evaluation in output_dir."""

    def __post_init__(self) -> None:
        """Check the options, without reading data."""
        for name in ("data", "forgetting_data", "base", "predictions", "output_dir"):
            value = getattr(self, name)
            if value is not None and str(value).startswith("~"):
                # The dataclass is frozen; `~` is expanded once, here.
                object.__setattr__(self, name, type(value)(expanded(value)))
        check_ranges(self)
        if not self.task:
            raise InputError(
                f"Invalid task: empty. Give one of {', '.join(TASKS)}, or {PREFIX}NAME."
            )
        for name in self.task:
            if self.task.count(name) > 1:
                raise InputError(f"Invalid task={','.join(self.task)}: {name} comes twice.")
            if name in ("", PREFIX):
                raise InputError(f"Invalid task={name!r}. Name the task of the harness as well.")
        for options in self.task_options:
            check_task(options)
        self._check_data()
        if self.predictions is not None and len(self.task) > 1:
            raise InputError(
                f"Invalid predictions with {len(self.task)} tasks: saved texts answer one. "
                "Run molf eval once for each file of predictions."
            )
        for name in ("base", "forgetting_data"):
            if getattr(self, name) is not None and self.predictions is not None:
                raise InputError(
                    f"Invalid {name}={getattr(self, name)} with predictions: saved texts hold no "
                    "probabilities. Leave one of them out."
                )
        if self.predictions is not None and self.harness_tasks:
            raise InputError(
                f"Invalid predictions with {self.task[0]}: lm-evaluation-harness measures models, "
                "not saved texts."
            )

    @property
    def task_options(self) -> list[TaskOptions]:
        """The options to load each built-in task with."""
        return [
            TaskOptions(
                name=name,
                data=self.data,
                format=self.format,
                max_samples=self.max_samples,
                few_shot=self.few_shot or 0,
                eval_part=self.eval_part,
                validation_share=self.validation_share,
                seed=self.seed,
                evaluation_only=True,
            )
            for name in self.task
            if not name.startswith(PREFIX)
        ]

    @property
    def harness_tasks(self) -> list[str]:
        """The names of lm-evaluation-harness's tasks, without their prefix."""
        return [name.removeprefix(PREFIX) for name in self.task if name.startswith(PREFIX)]

    def _check_data(self) -> None:
        """Reject data, or the task `custom`, that would be shared by several tasks."""
        own = [options.name for options in self.task_options]
        for option in ("data", "format", "forgetting_data", "eval_part", "validation_share"):
            if getattr(self, option) not in (None, "test") and not own:
                raise InputError(
                    f"Invalid {option}={getattr(self, option)} with {','.join(self.task)}: "
                    "lm-evaluation-harness brings its own data. Leave it out."
                )
        if self.base is not None and not own:
            raise InputError(
                f"Invalid base={self.base} with {','.join(self.task)}: tasks of "
                "lm-evaluation-harness are not compared with a base. Leave it out."
            )
        # Records of one task have not the fields of another.
        if len(own) > 1 and (self.data is not None or "custom" in own):
            given = "task=custom" if self.data is None else f"data={self.data}"
            raise InputError(
                f"Invalid {given} with the tasks {','.join(own)}: data belongs to one task. "
                "Run molf eval once with --task NAME --data FILE for each task that needs data, "
                "and once for the others."
            )
