"""Math word problems, scored by their final numbers.

MetaMathQA (Yu et al. 2024, ICLR) is trained on and GSM8K (Cobbe et al. 2021, arXiv 2110.14168) is
measured, as in PEFT's comparison of methods.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from molf.data.fields import filled_text, optional_text
from molf.data.files import Record, present_fields
from molf.errors import InputError
from molf.measure.final_numbers import final_number, is_final, shown, stated_number
from molf.measure.metric import Evaluation, Metric, wilson
from molf.measure.settings import EvaluationSettings, Progress
from molf.tasks.options import TaskOptions
from molf.tasks.question_task import QuestionTask
from molf.tasks.questions import Question, QuestionKind, UnusableRecordError, load_questions

TEST_DATA = "openai/gsm8k:main"
"""The records to evaluate on with the default training data: GSM8K's test split."""

LONGEST = 1300
"""Most characters of a query and its response in MetaMathQA's layout, as in PEFT's comparison."""

NOT_A_NUMBER = "final answer is no number"
"""The reason not to score a record of MetaMathQA, such as one with the answer `x^2 + 1`."""

_NEW_TOKENS = 300  # as in PEFT's comparison


@dataclass(frozen=True, kw_only=True)
class MathQuestion(Question):
    """A word problem with its solution, grouped by its type.

    Attributes:
        solution: The solution, which ends with the final answer.
        number: The final answer as `shown`; "" if it is no number.
        original: The question that this one is a version of; itself if it is none.
    """

    solution: str
    number: str
    original: str

    @property
    def prompt(self) -> str:
        """The question, in the words of PEFT's comparison."""
        return f"Question: {self.question} Think step by step.\nAnswer:"

    @property
    def answer(self) -> str:
        """A space and the solution."""
        return f" {self.solution}"

    @property
    def expected(self) -> str:
        """The final answer alone: solutions differ in their words."""
        return self.number

    @property
    def content(self) -> Hashable:
        """The original question: MetaMathQA has several versions of each one."""
        return " ".join(self.original.lower().split())


def parse_math_question(record: Record, where: str) -> MathQuestion:
    """Check a record of MetaMathQA or GSM8K.

    Args:
        record: `query`, `response`, `type`, `original_question` (the last two may be absent); or
            `question` and `answer`, with `#### N` at its end.
        where: The source and number of the record, for messages.

    Raises:
        InputError: A field is of the wrong kind, or the question is absent or empty.
        UnusableRecordError: There is no solution, GSM8K's has no final number, or MetaMathQA's
            record has over `LONGEST` characters.
    """
    if record.get("query") is not None:
        question_field, solution_field, unnamed = "query", "response", "unknown"
    elif record.get("question") is not None:
        question_field, solution_field, unnamed = "question", "answer", "GSM8K"
    else:
        has = ", ".join(present_fields(record)) or "none"
        raise InputError(f"{where}: lacks the field 'query' or 'question' (it has: {has}).")
    question = filled_text(record[question_field], f"{where}: {question_field}").strip()
    solution = optional_text(record.get(solution_field), f"{where}: {solution_field}")
    kind = optional_text(record.get("type"), f"{where}: type")
    original = optional_text(record.get("original_question"), f"{where}: original_question")
    if not solution:
        raise UnusableRecordError(f"no {solution_field}")
    number = stated_number(solution)
    if question_field == "question" and number is None:
        raise UnusableRecordError("no '#### NUMBER' in answer")
    if question_field == "query" and len(question) + 1 + len(solution) > LONGEST:
        raise UnusableRecordError(f"over {LONGEST:,} characters")
    return MathQuestion(
        question=question,
        group=kind or unnamed,
        solution=solution,
        number="" if number is None else shown(number),
        original=original or question,
    )


MATH = QuestionKind(
    default_data="meta-math/MetaMathQA",
    evaluation_splits=("test", "validation"),
    fields=(),  # of two layouts: `parse_math_question` checks them
    columns=(),
    parse=parse_math_question,
)


class MathTask(QuestionTask[MathQuestion]):
    """Train on the solutions; compare the final numbers of generated solutions.

    - `accuracy`: share of the answers whose final number (see `final_number`) has the value of the
      record's. Answers without a number are wrong.
    - `unparsed`: share of the answers without a number.

    Both with Wilson's intervals; `by_type` has the accuracy of each `type`. Records whose own final
    answer is no number are trained on, and not scored.
    """

    prompt = (
        "Question: {query} Think step by step.\\nAnswer: -> ' ' + response; demonstrations first, "
        "a blank line between"
    )
    prompt_version = 1

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Generate a solution of each problem, until its final number is given."""
        asked = self._ask(model, tokenizer, settings, progress)
        return self._evaluate_answers(
            model, tokenizer, asked, _NEW_TOKENS, is_final, settings, progress
        )

    def _metric_names(self) -> tuple[str, ...]:
        return ("accuracy", "unparsed")

    def _score(self, texts: Mapping[int, str], seed: int, progress: Progress | None) -> Evaluation:
        numbers = {index: final_number(text) for index, text in texts.items()}
        answers = {
            index: None if number is None else shown(number) for index, number in numbers.items()
        }

        def measure(indices: Iterable[int]) -> dict[str, Metric]:
            right = [answers[index] == self._question(index).number for index in indices]
            return {"accuracy": wilson(sum(right), len(right))}

        unparsed = sum(answer is None for answer in answers.values())
        return Evaluation(
            {**measure(texts), "unparsed": wilson(unparsed, len(texts))},
            tables={"by_type": self._by_group(texts, measure)},
            predictions=[
                {
                    "index": index,
                    "prediction": text,
                    "answer": answers[index],
                    "right": answers[index] == self._question(index).number,
                }
                for index, text in texts.items()
            ],
        )

    def _unscorable(self, indices: Iterable[int], progress: Progress | None) -> dict[int, str]:
        """Return the records whose own final answer is no number, with the reason."""
        return {index: NOT_A_NUMBER for index in indices if not self._question(index).number}


def load_math(options: TaskOptions) -> MathTask:
    """Load MetaMathQA and GSM8K, or data in their layouts; see `load_questions`.

    With the default data, GSM8K's test split is evaluated.

    Args:
        options: The options.
    """
    return MathTask(options, load_questions(_with_test_data(options), MATH))


def _with_test_data(options: TaskOptions) -> TaskOptions:
    """Return the options with GSM8K as evaluation data, unless other data is given."""
    if options.eval_data is not None or options.data not in (None, MATH.default_data):
        return options
    if options.evaluation_only and not options.validates:
        # `data` is then the evaluated data, of which `max_samples` draws.
        return replace(options, data=options.data or TEST_DATA)
    return replace(options, data=MATH.default_data, eval_data=TEST_DATA)
