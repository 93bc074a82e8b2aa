"""Questions with one right answer, read from records (tasks `sql`, `med` and `math`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from molf.data.files import Record, check_fields, present_fields
from molf.data.records import split_records
from molf.data.selection import draw, required_hold_out
from molf.data.selection import samples_of_runs as find_samples_of_runs
from molf.errors import InputError
from molf.tasks.options import TaskOptions
from molf.tasks.validation import part_record, split_for_validation


@dataclass(frozen=True, kw_only=True)
class Question(ABC):
    """A record with a question.

    Attributes:
        question: The question's text, without options or tables.
        group: The question's class in the tables of results.
    """

    question: str
    group: str

    @property
    @abstractmethod
    def prompt(self) -> str:
        """The prompt: all text before the answer."""

    @property
    @abstractmethod
    def answer(self) -> str:
        """The completion to train on."""

    @property
    def expected(self) -> str:
        """The answer in the record of predictions."""
        return self.answer.strip()

    @property
    def content(self) -> Hashable:
        """A key: records of equal keys are all trained on, or all held out."""
        return self.prompt, self.answer


Q = TypeVar("Q", bound=Question)

Splits = Mapping[str, Iterable[Record]]


class UnusableRecordError(Exception):
    """A record is well formed but cannot be used; the argument is the reason, for the counts."""


@dataclass(frozen=True, kw_only=True)
class QuestionKind(Generic[Q]):
    """The source and the layout of a task's records.

    Attributes:
        default_data: Hub id of the default data.
        evaluation_splits: The official splits to evaluate on, the preferred one first.
        fields: Fields that every record must have.
        columns: Fields that at least one record must have; a record without them is unusable.
        parse: Converts a record, named in messages by the text, to a question; raises InputError
            or UnusableRecordError.
    """

    default_data: str
    evaluation_splits: tuple[str, ...]
    fields: tuple[str, ...]
    columns: tuple[str, ...]
    parse: Callable[[Record, str], Q]


@dataclass(frozen=True, kw_only=True)
class QuestionSet(Generic[Q]):
    """The questions of one data file or split.

    Attributes:
        records: Number of all records.
        questions: The questions of usable records, by 0-based record index.
        left_out: Number of unusable records, by reason.
    """

    records: int
    questions: dict[int, Q]
    left_out: Counter[str]


@dataclass(frozen=True, kw_only=True)
class QuestionData(Generic[Q]):
    """The questions of a task.

    Attributes:
        training: The questions to train on, by record index; empty for evaluation only.
        read: All questions of the training split; None where nothing is trained.
        evaluation: The evaluation data.
        evaluated: Indices of the records of `evaluation` to evaluate.
        held_out: Indices of the records of the training split that are kept for evaluation.
        samples_of_runs: Sets of records of `evaluation` that earlier runs on this data may have
            evaluated; empty where a model is trained.
        pool: Questions to draw demonstrations from: those of the training split that are not
            evaluated. Empty where that split is not read.
        source: Origin of the records, for the run's files.
    """

    training: dict[int, Q]
    read: QuestionSet[Q] | None
    evaluation: QuestionSet[Q]
    evaluated: list[int]
    held_out: list[int]
    samples_of_runs: list[list[int]]
    pool: list[Q]
    source: dict[str, str]

    @property
    def training_left_out(self) -> Counter[str]:
        """Number of unusable training records, by reason."""
        return Counter() if self.read is None else self.read.left_out


def load_questions(
    options: TaskOptions,
    kind: QuestionKind[Q],
    splits: Splits | None = None,
    groups: Sequence[Hashable] | None = None,
) -> QuestionData[Q]:
    """Read and check the questions that the options select.

    The evaluation records are the first that exist of: `eval_data`; the official split of `data`;
    a share of `data`, held out by the seed, or all of it where nothing is trained. With
    `eval_part="validation"` they are a fixed part of the training records.

    Args:
        options: The options.
        kind: The source and the layout of the records.
        splits: The task's own records, in place of `data` and `eval_data`.
        groups: For each of the task's own training records, a key; the validation part has all
            records of a key or none. None for keys by content.

    Raises:
        InputError: The data is missing, unreachable or invalid, or no record can be used.
    """
    found = _find(options, kind, splits)
    if options.validates and found.training is not None:
        return _validation_data(options, found, found.training, groups)
    if options.evaluation_only or found.training is None:
        return _evaluation_data(options, found)
    return _training_data(options, found, found.training)


@dataclass(frozen=True, kw_only=True)
class _Found(Generic[Q]):
    """The questions that the options name, before any is drawn.

    Attributes:
        data: Name of the training data.
        training: The questions of the training split; None where it is not read.
        evaluation: The questions to evaluate on: `training` itself where no others exist.
        is_official: Whether they are for evaluation alone.
        evaluated_on: Their origin.
    """

    data: str
    training: QuestionSet[Q] | None
    evaluation: QuestionSet[Q]
    is_official: bool
    evaluated_on: str

    @property
    def sources(self) -> dict[str, str]:
        """The origins of both, for the run's files."""
        training = {} if self.training is None else {"data": self.data}
        return {**training, "evaluated_on": self.evaluated_on}

    def content(self, index: int) -> Hashable:
        """Return the content of a question of the evaluation."""
        return self.evaluation.questions[index].content


def _find(options: TaskOptions, kind: QuestionKind[Q], splits: Splits | None) -> _Found[Q]:
    data = options.name if splits is not None else options.data or kind.default_data
    needs_training = bool(not options.evaluation_only or options.few_shot or options.validates)
    own: Splits = {}
    if splits is not None:
        own = splits
    elif needs_training or options.eval_data is None:
        own = split_records(data)
    training = None
    if needs_training or splits is not None:
        training = _training_set(own, kind, data)
    if options.eval_data is not None:
        other = split_records(options.eval_data, option=options.eval_option)
        split = _evaluation_split(other, options.evaluation_splits(kind.evaluation_splits))
        return _Found(
            data=data,
            training=training,
            evaluation=_question_set(other, split, kind, options.eval_data),
            is_official=True,
            evaluated_on=options.eval_data,
        )
    split = _evaluation_split(own, kind.evaluation_splits)
    is_official = split != "train"
    return _Found(
        data=data,
        training=training,
        evaluation=(
            _question_set(own, split, kind, data) if is_official or training is None else training
        ),
        is_official=is_official,
        evaluated_on=f"the {split} split of {data}" if len(own) > 1 else data,
    )


def _training_data(
    options: TaskOptions, found: _Found[Q], training: QuestionSet[Q]
) -> QuestionData[Q]:
    """Train on questions, and evaluate the official ones or a share that is held out."""
    trained_on = draw(list(training.questions), options.max_samples, options.seed)
    evaluated = list(found.evaluation.questions)
    held_out: list[int] = []
    source = found.sources
    if not found.is_official:
        trained_on, held_out = required_hold_out(
            trained_on, options.seed, found.content, found.data, preview=options.preview
        )
        evaluated = held_out
        source["evaluated_on"] = (
            f"{len(held_out)} records held out of {found.data} (seed {options.seed})"
        )
    apart = set(held_out)
    return QuestionData(
        training={index: training.questions[index] for index in trained_on},
        read=training,
        evaluation=found.evaluation,
        evaluated=draw(evaluated, options.max_eval_samples, options.seed),
        held_out=held_out,
        samples_of_runs=[],
        pool=[one for index, one in training.questions.items() if index not in apart],
        source=source,
    )


def _evaluation_data(options: TaskOptions, found: _Found[Q]) -> QuestionData[Q]:
    """Evaluate questions, and train on none."""
    evaluated = list(found.evaluation.questions)
    samples_of_runs: list[list[int]] = []
    if options.eval_data is None:
        samples_of_runs = [evaluated]
        if not found.is_official:
            samples_of_runs = find_samples_of_runs(
                evaluated,
                found.content,
                most=options.max_samples,
                most_evaluated=options.max_eval_samples,
                seed=options.seed,
            )
        evaluated = draw(evaluated, options.max_samples, options.seed)
    evaluated = draw(evaluated, options.max_eval_samples, options.seed)
    pool = [] if found.training is None else list(found.training.questions.values())
    if not found.is_official:
        asked = {found.content(index) for index in evaluated}
        pool = [question for question in pool if question.content not in asked]
    return QuestionData(
        training={},
        read=found.training,
        evaluation=found.evaluation,
        evaluated=evaluated,
        held_out=[],
        samples_of_runs=samples_of_runs,
        pool=pool,
        source={**found.sources, **({} if found.is_official else {"evaluated_split": "train"})},
    )


def _validation_data(
    options: TaskOptions,
    found: _Found[Q],
    training: QuestionSet[Q],
    groups: Sequence[Hashable] | None,
) -> QuestionData[Q]:
    """Measure the validation part of the training records, and train on others."""
    questions = training.questions
    test = None if found.evaluation is training else found.evaluation
    rest, part = split_for_validation(
        options,
        list(questions),
        lambda index: questions[index].content,
        None if test is None else {question.content for question in test.questions.values()},
        found.data,
        None if groups is None else lambda index: groups[index],
    )
    trained_on = [] if options.evaluation_only else draw(rest, options.max_samples, options.seed)
    most = options.max_samples if options.evaluation_only else None
    evaluated = draw(draw(part, most, options.seed), options.max_eval_samples, options.seed)
    return QuestionData(
        training={index: questions[index] for index in trained_on},
        read=training,
        evaluation=training,
        evaluated=evaluated,
        held_out=part,
        samples_of_runs=[part] if options.evaluation_only else [],
        pool=[questions[index] for index in rest],
        source={"data": found.data, **part_record(options, part, found.data)},
    )


def _training_set(splits: Splits, kind: QuestionKind[Q], data: str) -> QuestionSet[Q]:
    if "train" not in splits:
        raise InputError(f"data: {data} has no training records (only {', '.join(splits)}).")
    return _question_set(splits, "train", kind, data)


def _evaluation_split(splits: Splits, preferred: tuple[str, ...]) -> str:
    return next(name for name in (*preferred, "train") if name in splits)


def _question_set(splits: Splits, split: str, kind: QuestionKind[Q], data: str) -> QuestionSet[Q]:
    where = data if len(splits) == 1 else f"{data} ({split})"
    questions: dict[int, Q] = {}
    left_out: Counter[str] = Counter()
    lacking = list(kind.columns)
    first: Record = {}
    count = 0
    for index, record in enumerate(splits[split]):
        check_fields(record, kind.fields, f"{where}, record {index}")
        lacking = [name for name in lacking if record.get(name) is None]
        parsed = _parse(record, f"{where}, record {index}", kind)
        if isinstance(parsed, UnusableRecordError):
            left_out[str(parsed)] += 1
        else:
            questions[index] = parsed
        first = first or record
        count += 1
    if lacking:
        has = ", ".join(present_fields(first)) or "none"
        raise InputError(f"{where}: no record has the field {lacking[0]!r} (record 0 has: {has}).")
    if not questions:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in left_out.items())
        raise InputError(f"{where}: none of the {count} records can be used ({reasons}).")
    return QuestionSet(records=count, questions=questions, left_out=left_out)


def _parse(record: Record, where: str, kind: QuestionKind[Q]) -> Q | UnusableRecordError:
    try:
        return kind.parse(record, where)
    except UnusableRecordError as error:
        return error
