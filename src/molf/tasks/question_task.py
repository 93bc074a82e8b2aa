"""The base class of question tasks: prompts, generation, records left out."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self

from molf.data.sample_store import ChosenSamples
from molf.data.samples import PromptCompletion, Sample
from molf.errors import InputError
from molf.measure.metric import Evaluation, Metric
from molf.measure.nearest import nearest
from molf.measure.settings import EvaluationSettings, Progress
from molf.measure.spread import spread
from molf.tasks.answers import generate_answers
from molf.tasks.base import DataRecords, Task
from molf.tasks.demonstrations import Demonstrations
from molf.tasks.options import TaskOptions
from molf.tasks.predictions import (
    check_predictions,
    left_out_prediction,
    predicted_sample,
    restrict_to_sample,
)
from molf.tasks.questions import Q, Question, QuestionData

if TYPE_CHECKING:
    from molf.data.encoding import GenerationContext
    from molf.measure.generate import FirstLogits

TOO_LONG = "too long"
NOT_SCORED = "not scored"  # such as a gold query that exceeds its time in one of two runs


@dataclass(frozen=True)
class Asked:
    """The evaluated records: those that the model answers, and those left out.

    Attributes:
        samples: Prompt and right answer of each record to answer, by record index.
        left_out: The reason for each other record.
        contexts: The prompts as tokens; empty where saved texts are scored.
    """

    samples: dict[int, PromptCompletion]
    left_out: dict[int, str]
    contexts: list[GenerationContext] = field(default_factory=list)


class PromptedQuestions(Mapping[int, PromptCompletion]):
    """Questions with their demonstrations, by record; each is made when it is read.

    All prompts at once take as much memory as the questions, with demonstrations a multiple.

    Args:
        questions: The questions by record.
        instruction: The first text of every prompt.
        demonstrations: Draws the questions that are shown before another.
    """

    def __init__(
        self, questions: Mapping[int, Question], instruction: str, demonstrations: Demonstrations
    ) -> None:
        self._questions = questions
        self._instruction = instruction
        self._demonstrations = demonstrations

    def __getitem__(self, index: int) -> PromptCompletion:
        question = self._questions[index]
        return _prompted(question, index, self._instruction, self._demonstrations)

    def __iter__(self) -> Iterator[int]:
        return iter(self._questions)

    def __len__(self) -> int:
        return len(self._questions)


class QuestionTask(Task, Generic[Q]):
    """Questions with one right answer each.

    Attributes:
        instruction: The first text of every prompt.
    """

    instruction: ClassVar[str] = ""

    def __init__(
        self,
        options: TaskOptions,
        data: QuestionData[Q],
        baseline: Sequence[Q] = (),
        forgetting_text: Callable[[], str] | None = None,
    ) -> None:
        """Hold the questions.

        Args:
            options: The options that `data` was loaded with.
            data: The questions.
            baseline: Training questions; the answer of the nearest one is scored as a baseline.
            forgetting_text: Returns the text for `forgetting_loss`; None for the default text.

        Raises:
            InputError: There are too few training records for the demonstrations.
        """
        self._data = data
        self._few_shot = options.few_shot
        self._seed = options.seed
        self._forgetting_text = forgetting_text
        self._demonstrations = Demonstrations(data.pool, options.few_shot, options.seed)
        self._baseline = baseline
        self._check_demonstrations()
        super().__init__(options.name, self._samples(data.training), data.source)

    def _samples(self, indices: Iterable[int]) -> ChosenSamples:
        """Return the training samples of some records, each made when it is read."""
        prompted = PromptedQuestions(self._data.training, self.instruction, self._demonstrations)
        return ChosenSamples(prompted, list(indices))

    def _check_demonstrations(self) -> None:
        """Raise the error of too few demonstrations before a model is loaded."""
        for index in self._data.evaluated if self._few_shot else ():
            self._demonstrations.before(self._question(index))

    def with_part(self, rest: Sequence[int], part: Sequence[int], measured: Sequence[int]) -> Self:
        """Return the task with a part set aside, which no demonstration is of.

        Raises:
            InputError: There are too few other training records for the demonstrations.
        """
        found = super().with_part(rest, part, measured)
        if not self._few_shot:
            return found
        indices = list(self._data.training)
        # By prompts, because the answer of a training record may be a wrong one (`label_noise`).
        apart = {self._data.training[indices[position]].prompt for position in part}
        pool = [question for question in self._data.pool if question.prompt not in apart]
        found._data = replace(self._data, pool=pool)
        found._demonstrations = Demonstrations(pool, self._few_shot, self._seed)
        found._check_demonstrations()
        found.training_samples = found._samples(indices[position] for position in rest)
        found.validation_samples = list(found._samples(indices[one] for one in measured))
        return found

    @property
    def evaluation_count(self) -> int:
        """The number of records to evaluate, those included that prove unusable."""
        return len(self._data.evaluated)

    def evaluated_samples(self, most: int) -> list[Sample]:
        """Return evaluated questions, each with its demonstrations."""
        chosen = spread(self._data.evaluated, most)
        return [self._sample(self._question(index), index) for index in chosen]

    def data_records(self) -> DataRecords:
        """Return the questions of the training split, each with its demonstrations."""
        data = self._data
        if data.read is None:
            return DataRecords(0, {}, Counter(), ())
        questions = {**data.read.questions, **data.training}
        return DataRecords(
            data.read.records,
            PromptedQuestions(questions, self.instruction, self._demonstrations),
            data.read.left_out,
            data.training.keys(),
            data.held_out,
        )

    def description(self) -> dict[str, Any]:
        """Return the task's entries for the configuration file of a run."""
        return {
            **super().description(),
            "few_shot": self._few_shot,
            "training_records_left_out": dict(self._data.training_left_out),
            "evaluation_records_left_out": dict(self._data.evaluation.left_out),
        }

    def score_predictions(self, predictions: list[dict[str, Any]]) -> Evaluation:
        """Measure the metrics of texts; `notes["not_measured"]` lists those that need the model."""
        data = self._data
        saved = check_predictions(predictions, data.evaluation.records, self._copied_fields)
        sample = predicted_sample(
            saved, data.evaluated, data.samples_of_runs, lambda some: self._unscorable(some, None)
        )
        scorable, left_out = _split(sample, self._unscorable(sample, None))
        saved = restrict_to_sample(saved, scorable)
        samples = {index: self._sample(self._question(index), index) for index in saved.texts}
        evaluation = self._score(saved.texts, self._seed, None)
        return self._finish(evaluation, Asked(samples, left_out | saved.left_out))

    def _copied_fields(self, index: int) -> dict[str, str]:
        """Return the fields of a record that a prediction copies; none of an unusable record."""
        question = self._data.evaluation.questions.get(index)
        if question is None:
            return {}
        return {"prompt": question.prompt, "expected": question.expected}

    @abstractmethod
    def _score(self, texts: Mapping[int, str], seed: int, progress: Progress | None) -> Evaluation:
        """Score answers, given by record index."""

    def _answer_from(self, known: Q, asked: Q) -> str:
        """Return the answer to a question by that to a similar one."""
        return known.answer.strip()

    def _nearest_answers(self, indices: Sequence[int]) -> dict[int, str]:
        """Return the answers by the nearest training questions, by record index."""
        asked = [self._question(index) for index in indices]
        found = nearest([one.question for one in self._baseline], [one.question for one in asked])
        return {
            index: self._answer_from(self._baseline[position], question)
            for index, question, position in zip(indices, asked, found, strict=True)
        }

    def _unscorable(self, indices: Iterable[int], progress: Progress | None) -> dict[int, str]:
        """Return the reason for each record that cannot be scored."""
        return {}

    def _ask(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None,
    ) -> Asked:
        """Select the records to answer: those that can be scored and are not too long."""
        from molf.data.encoding import generation_contexts, tokenize_samples
        from molf.measure.inference import length_limit
        from molf.measure.tokens import check_tokenizer

        check_tokenizer(tokenizer)
        left_out = self._unscorable(self._data.evaluated, progress)
        scorable, left_out = _split(self._data.evaluated, left_out)
        samples = [self._sample(self._question(index), index) for index in scorable]
        contexts = generation_contexts(tokenizer, tokenize_samples(tokenizer, samples))
        lengths = [context.text.length(tokenizer.eos_token_id) for context in contexts]
        limit = length_limit(model, settings.max_length)
        fitting = [position for position, length in enumerate(lengths) if length <= limit]
        if not fitting:
            raise InputError(
                f"All {len(lengths)} questions are longer than max_length={limit} tokens; the "
                f"longest has {max(lengths)}."
            )
        kept = {scorable[position]: samples[position] for position in fitting}
        left_out |= {index: TOO_LONG for index in scorable if index not in kept}
        return Asked(kept, left_out, [contexts[position] for position in fitting])

    def _answers(
        self,
        model: Any,
        tokenizer: Any,
        asked: Asked,
        max_new_tokens: int,
        is_complete: Callable[[str], bool],
        settings: EvaluationSettings,
        progress: Progress | None,
        first_logits: FirstLogits | None = None,
    ) -> dict[int, str]:
        """Generate the model's answer to each record."""
        texts = generate_answers(
            model,
            tokenizer,
            asked.contexts,
            settings.max_new_tokens or max_new_tokens,
            settings,
            progress,
            is_complete,
            first_logits,
        )
        return dict(zip(asked.samples, texts, strict=True))

    def _evaluate_answers(
        self,
        model: Any,
        tokenizer: Any,
        asked: Asked,
        max_new_tokens: int,
        is_complete: Callable[[str], bool],
        settings: EvaluationSettings,
        progress: Progress | None,
    ) -> Evaluation:
        """Generate the model's answer to each record, and score it."""
        texts = self._answers(
            model, tokenizer, asked, max_new_tokens, is_complete, settings, progress
        )
        evaluation = self._score(texts, settings.seed, progress)
        evaluation.notes["max_new_tokens"] = settings.max_new_tokens or max_new_tokens
        return self._finish(evaluation, asked)

    def _finish(self, evaluation: Evaluation, asked: Asked) -> Evaluation:
        """Add prompts, expected answers, the baseline, and the records left out."""
        scored = [entry["index"] for entry in evaluation.predictions]
        not_scored = asked.samples.keys() - set(scored)
        left_out = {**asked.left_out, **dict.fromkeys(not_scored, NOT_SCORED)}
        if self._baseline:
            by_nearest = self._score(self._nearest_answers(scored), 0, None)
            evaluation.tables["baselines"] = {"nearest_training_answer": by_nearest.metrics}
        for entry in evaluation.predictions:
            entry["expected"] = self._question(entry["index"]).expected
            entry["prompt"] = asked.samples[entry["index"]].prompt
        evaluation.predictions += [
            left_out_prediction(index, reason) for index, reason in left_out.items()
        ]
        evaluation.predictions.sort(key=lambda entry: entry["index"])
        evaluation.notes["records_left_out"] = dict(
            self._data.evaluation.left_out + Counter(left_out.values())
        )
        return evaluation

    def _by_group(
        self, indices: Iterable[int], measure: Callable[[list[int]], dict[str, Metric]]
    ) -> dict[str, dict[str, Metric]]:
        """Compute metrics per group of questions, in alphabetical order."""
        groups: dict[str, list[int]] = {}
        for index in indices:
            groups.setdefault(self._question(index).group, []).append(index)
        return {group: measure(groups[group]) for group in sorted(groups)}

    def _question(self, index: int) -> Q:
        return self._data.evaluation.questions[index]

    def _sample(self, question: Q, index: int) -> PromptCompletion:
        return _prompted(question, index, self.instruction, self._demonstrations)


def _prompted(
    question: Question, index: int, instruction: str, demonstrations: Demonstrations
) -> PromptCompletion:
    """Return a question with its demonstrations, the same in training and in evaluation."""
    shown = [f"{shown.prompt}{shown.answer}" for shown in demonstrations.before(question)]
    blocks = [*filter(None, [instruction]), *shown, question.prompt]
    return PromptCompletion("\n\n".join(blocks), question.answer, index)


def _split(
    sample: Collection[int], left_out: Mapping[int, str]
) -> tuple[list[int], dict[int, str]]:
    """Split a sample into the records that can be scored and the reasons for the others."""
    scorable = [index for index in sample if index not in left_out]
    reasons = {index: left_out[index] for index in sample if index in left_out}
    if not scorable:
        counts = Counter(reasons.values())
        raise InputError(
            f"None of the {len(sample)} evaluated records can be scored "
            f"({', '.join(f'{reason}: {count}' for reason, count in counts.items())})."
        )
    return scorable, reasons
