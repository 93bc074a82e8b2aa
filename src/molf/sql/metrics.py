"""The metrics of generated SQL, named as in `eval.json`.

They are those of the paper's reference code; the functions that compute them define them. Execution
accuracy and logical form accuracy are from Zhong et al. 2017 (Seq2SQL, arXiv:1709.00103), BLEU from
Papineni et al. 2002. Queries are compared only on the database of their own example.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from molf.measure.metric import Metric, bootstrap_mean, wilson
from molf.sql.bleu import bleu
from molf.sql.compare import same_result, same_set
from molf.sql.limits import Limits
from molf.sql.logic import LogicMatcher
from molf.sql.result import Effect, QueryResult
from molf.sql.sandbox import Sandbox
from molf.sql.text import first_statement, has_outer_order

WITH_ROWS = "execution_accuracy_with_rows"
"""`execution_accuracy` of the examples whose gold query finds or changes something."""

SHARES = (
    "execution_accuracy",
    "execution_accuracy_set",
    "exact_match",
    "logic_match",
    "valid_sql",
)
MEANS = ("bleu_1", "bleu_4")

_ORDER = (SHARES[0], WITH_ROWS, *SHARES[1:])
METRICS = (*_ORDER, *MEANS)

_IN_FLIGHT_PER_WORKER = 8  # results are yielded in order: finished ones wait for a slow one

Item = TypeVar("Item")
Judgement = TypeVar("Judgement")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A generated query to score.

    Attributes:
        schema: The statements that create its database.
        gold: The gold query.
        text: The generated text.
    """

    schema: str
    gold: str
    text: str


@dataclass(frozen=True, kw_only=True)
class SqlScore:
    """The scores of one generated query.

    Attributes:
        statement: The query found in the text.
        error: Why it failed, such as "query: time"; None where it ran.
        execution_accuracy: Whether its result equals the gold query's, see `same_result`.
        execution_accuracy_set: The same, compared as in the reference code, see `same_set`.
        exact_match: Whether its text equals the gold query's, see `exact_match`.
        logic_match: Whether its normalised syntax tree equals the gold query's, see `LogicMatcher`.
        bleu_1: Sentence BLEU of single words, in [0, 1].
        bleu_4: Sentence BLEU, in [0, 1].
        valid_sql: Whether it runs on the schema, within the limits.
        gold_effect: Whether the gold query returns rows, changes a table or changes the schema.
        gold_with_rows: Whether the gold query returns at least one row, or leaves the table or
            schema changed; a NULL or a count of 0 is a row. Otherwise, a query that does nothing
            is right.
    """

    statement: str
    error: str | None
    execution_accuracy: bool
    execution_accuracy_set: bool
    exact_match: bool
    logic_match: bool
    bleu_1: float
    bleu_4: float
    valid_sql: bool
    gold_effect: Effect
    gold_with_rows: bool


class SqlScorer:
    """Scores generated queries by running them in the sandbox. A context manager.

    Args:
        limits: Limits of a query.
        workers: Number of examples scored at the same time.

    Raises:
        ValueError: `workers` is below 1.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 2) -> None:
        self._workers = workers
        self._matcher = LogicMatcher(workers=workers)
        self._sandbox = Sandbox(limits, workers)

    def gold_failures(self, pairs: Iterable[tuple[str, str]]) -> Iterator[str | None]:
        """Yield for each (schema, gold query), in order, why it fails; None if it runs.

        Only examples whose gold query runs are scored.
        """
        return self._map(lambda pair: _reason(self._sandbox.run(*pair)), pairs)

    def scores(self, examples: Iterable[Example]) -> Iterator[SqlScore | None]:
        """Score examples, in order; None where the gold query fails.

        Raises:
            RuntimeError: No worker could be started.
        """
        return self._map(self.score, examples)

    def score(self, example: Example) -> SqlScore | None:
        """Score one example; None where the gold query fails."""
        gold = self._sandbox.run(example.schema, example.gold)
        if not gold.ok:
            return None
        # To count examples in which a query that does nothing is right.
        nothing = self._sandbox.unchanged(example.schema, gold)
        statement = first_statement(example.text)
        predicted = self._sandbox.run(example.schema, statement)
        ordered = has_outer_order(example.gold)
        bare_gold = _bare(example.gold)  # `statement` has no `;` either
        return SqlScore(
            statement=statement,
            error=_reason(predicted),
            execution_accuracy=same_result(gold, predicted, ordered=ordered),
            execution_accuracy_set=same_set(gold, predicted),
            exact_match=exact_match(example.gold, statement),
            logic_match=self._matcher.match(example.gold, statement),
            bleu_1=bleu(bare_gold, statement, 1),
            bleu_4=bleu(bare_gold, statement, 4),
            valid_sql=predicted.ok,
            gold_effect=gold.effect,
            gold_with_rows=not same_result(gold, nothing, ordered=False),
        )

    def close(self) -> None:
        """End the workers."""
        self._sandbox.close()
        self._matcher.close()

    def __enter__(self) -> SqlScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _map(
        self, judge: Callable[[Item], Judgement], items: Iterable[Item]
    ) -> Iterator[Judgement]:
        """Score items in parallel and yield the scores in order; bound the number in flight."""
        with ThreadPoolExecutor(self._workers) as threads:
            running: deque[Future[Judgement]] = deque()
            for item in items:
                running.append(threads.submit(judge, item))
                if len(running) == _IN_FLIGHT_PER_WORKER * self._workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()


def exact_match(gold: str, predicted: str) -> bool:
    """Return whether texts are equal after trimming, dropping a trailing `;` and upper-casing."""
    return _bare(gold).upper() == _bare(predicted).upper()


def sql_metrics(scores: Sequence[SqlScore], seed: int = 0) -> dict[str, Metric]:
    """Compute the metrics over scores: shares with Wilson's intervals, means with bootstrap's.

    Args:
        scores: One per example whose gold query runs. Without scores there are no metrics; without
            a score of a gold query with rows there is no `execution_accuracy_with_rows`.
        seed: Seed of the bootstrap.
    """
    if not scores:
        return {}
    count = len(scores)
    metrics = {name: wilson(sum(getattr(s, name) for s in scores), count) for name in SHARES}
    with_rows = [score.execution_accuracy for score in scores if score.gold_with_rows]
    if with_rows:
        metrics[WITH_ROWS] = wilson(sum(with_rows), len(with_rows))
    means = {name: bootstrap_mean([getattr(s, name) for s in scores], seed=seed) for name in MEANS}
    return {name: metrics[name] for name in _ORDER if name in metrics} | means


def gold_without_rows(scores: Iterable[SqlScore]) -> dict[str, int]:
    """Count the gold queries that find nothing ("queries") or change nothing ("changes")."""
    kinds = Counter(
        "queries" if score.gold_effect == "rows" else "changes"
        for score in scores
        if not score.gold_with_rows
    )
    return dict(kinds)


def _bare(text: str) -> str:
    return text.strip().removesuffix(";").rstrip()


def _reason(result: QueryResult) -> str | None:
    return None if result.ok else result.reason
