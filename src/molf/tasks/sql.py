"""Writing SQL for a question: `gretelai/synthetic_text_to_sql` (Gretel 2024)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from molf.measure.metric import Evaluation
from molf.measure.settings import EvaluationSettings, Progress
from molf.sql.limits import Limits
from molf.sql.metrics import (
    METRICS,
    Example,
    SqlScore,
    SqlScorer,
    gold_without_rows,
    sql_metrics,
)
from molf.sql.text import is_complete
from molf.tasks.answers import longest_answer
from molf.tasks.options import TaskOptions
from molf.tasks.question_task import QuestionTask
from molf.tasks.questions import QuestionData, Splits, load_questions
from molf.tasks.sql_questions import SQL, SqlQuestion

_SPARE_TOKENS = 32  # beyond the longest gold query: a longer query may be right too
_MOST_NEW_TOKENS = 512


class SqlTask(QuestionTask[SqlQuestion]):
    """Train on the queries; run generated queries and compare them with the gold queries.

    The metrics are defined in `molf.sql.metrics.SqlScore`; `by_complexity` has all of them for each
    `sql_complexity`. `notes["gold_without_rows"]` counts the records for which a query that does
    nothing is right. Only records whose gold query runs are evaluated; the others are counted. All
    records are trained on, as in the paper.
    """

    instruction = "Write an SQLite query that answers the question."
    prompt = (
        f"{instruction}\\n\\nQuestion: {{sql_prompt}}\\nTables: {{sql_context}}\\nSQL: "
        "-> ' ' + sql; demonstrations behind the instruction, a blank line between"
    )
    prompt_version = 1

    def __init__(
        self,
        options: TaskOptions,
        data: QuestionData[SqlQuestion],
        baseline: Sequence[SqlQuestion] = (),
        forgetting_text: Callable[[], str] | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Store the questions, and the `limits` of one query."""
        super().__init__(options, data, baseline, forgetting_text)
        self._limits = limits
        self._failures: dict[int, str | None] = {}  # per gold query run so far: why it failed

    def _metric_names(self) -> tuple[str, ...]:
        return METRICS

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvaluationSettings,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Generate a query for each question and run it."""
        asked = self._ask(model, tokenizer, settings, progress)
        expected = [sample.answer for sample in asked.samples.values()]
        limit = min(longest_answer(tokenizer, expected) + _SPARE_TOKENS, _MOST_NEW_TOKENS)
        return self._evaluate_answers(
            model, tokenizer, asked, limit, is_complete, settings, progress
        )

    def _score(self, texts: Mapping[int, str], seed: int, progress: Progress | None) -> Evaluation:
        questions = [self._question(index) for index in texts]
        examples = [
            Example(schema=question.schema, gold=question.query, text=text)
            for question, text in zip(questions, texts.values(), strict=True)
        ]
        scores: dict[int, SqlScore] = {}
        with SqlScorer(self._limits) as scorer:
            judged = zip(texts, scorer.scores(examples), strict=True)
            for done, (index, score) in enumerate(judged, start=1):
                if score is not None:
                    scores[index] = score
                if progress is not None:
                    progress("execution", done, len(texts))
        return Evaluation(
            sql_metrics(list(scores.values()), seed),
            notes={"gold_without_rows": gold_without_rows(scores.values())},
            tables={
                "by_complexity": self._by_group(
                    scores, lambda indices: sql_metrics([scores[i] for i in indices], seed)
                )
            },
            predictions=[
                {
                    "index": index,
                    "prediction": texts[index],
                    **asdict(score),
                    "right": score.execution_accuracy,
                }
                for index, score in scores.items()
            ],
        )

    def _unscorable(self, indices: Iterable[int], progress: Progress | None) -> dict[int, str]:
        """Return the records whose gold query fails, with the reason; run each once per task."""
        wanted = sorted(indices)
        new = [index for index in wanted if index not in self._failures]
        if new:
            questions = [self._question(index) for index in new]
            with SqlScorer(self._limits) as scorer:
                found = scorer.gold_failures((q.schema, q.query) for q in questions)
                for done, (index, reason) in enumerate(zip(new, found, strict=True), start=1):
                    self._failures[index] = reason
                    if progress is not None:
                        progress("gold queries", done, len(new))
        reasons = {index: self._failures[index] for index in wanted}
        return {index: f"gold {reason}" for index, reason in reasons.items() if reason is not None}


def load_sql(
    options: TaskOptions,
    splits: Splits | None = None,
    forgetting_text: Callable[[], str] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> SqlTask:
    """Load Gretel's records, or data in their layout; see `load_questions`.

    Args:
        options: The options.
        splits: Records of a demo task, which also scores the nearest training answer.
        forgetting_text: Returns the demo task's text for `forgetting_loss`.
        groups: See `load_questions`.
    """
    data = load_questions(options, SQL, splits, groups)
    return SqlTask(options, data, () if splits is None else data.pool, forgetting_text)
