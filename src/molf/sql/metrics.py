"""The metrics of generated SQL, under the names of `eval.json`.

They are those of the paper's reference code, defined where each is computed. Execution accuracy and
logical form accuracy go back to Zhong et al. 2017 (Seq2SQL, arXiv:1709.00103), BLEU to Papineni et
al. 2002. A query is compared on the database of its own example alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from molf.evaluate.metric import Metric, bootstrap_mean, wilson
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

_IN_FLIGHT_PER_WORKER = 8  # finished ones wait for a slow one before them, to be in order

Item = TypeVar("Item")
Judgement = TypeVar("Judgement")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A query to be judged.

    Attributes:
        schema: The statements that make its database.
        gold: The query that is asked for.
        text: What the model generated.
    """

    schema: str
    gold: str
    text: str


@dataclass(frozen=True, kw_only=True)
class SqlScore:
    """How good one generated query is.

    Attributes:
        statement: The query that was found in the text.
        error: Why it failed, such as "query: time"; None where it ran.
        execution_accuracy: Its result is the gold query's, see `same_result`.
        execution_accuracy_set: The same, compared as the reference does, see `same_set`.
        exact_match: Its text is the gold query's, see `exact_match`.
        logic_match: Its normalised syntax tree is the gold query's, see `LogicMatcher`.
        bleu_1: Sentence BLEU of single words, in [0, 1].
        bleu_4: Sentence BLEU, in [0, 1].
        valid_sql: It runs on the schema, within the limits.
        gold_effect: Whether the gold query returns rows, changes a table or changes the schema.
        gold_with_rows: It returns at least one row, or leaves the table or schema changed. If not,
            a query that does nothing is right. A NULL or a count of 0 is a row.
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
    """Judges generated queries, each in the sandbox. A context manager.

    Args:
        limits: How much a query may use.
        workers: How many examples are judged at the same time.

    Raises:
        ValueError: `workers` is below 1.
        ModuleNotFoundError: sqlglot is not installed.
    """

    def __init__(self, limits: Limits | None = None, workers: int = 2) -> None:
        self._workers = workers
        self._matcher = LogicMatcher(workers=workers)
        self._sandbox = Sandbox(limits, workers)

    def gold_failures(self, pairs: Iterable[tuple[str, str]]) -> Iterator[str | None]:
        """For each (schema, gold query), in order, why it cannot be used; None if it runs.

        Only examples whose gold query runs are scored.
        """
        return self._map(lambda pair: _reason(self._sandbox.run(*pair)), pairs)

    def scores(self, examples: Iterable[Example]) -> Iterator[SqlScore | None]:
        """Judge examples, in order; None where the gold query fails.

        Raises:
            RuntimeError: No worker could be started.
        """
        return self._map(self.score, examples)

    def score(self, example: Example) -> SqlScore | None:
        """Judge one example; None where the gold query fails."""
        gold = self._sandbox.run(example.schema, example.gold)
        if not gold.ok:
            return None
        nothing = self._sandbox.unchanged(example.schema, gold)
        statement = first_statement(example.text)
        predicted = self._sandbox.run(example.schema, statement)
        ordered = has_outer_order(example.gold)
        bare_gold = _bare(example.gold)  # the text is without its `;` too
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
        """Judge items in parallel and yield in order, a bounded number of them in flight."""
        with ThreadPoolExecutor(self._workers) as threads:
            running: deque[Future[Judgement]] = deque()
            for item in items:
                running.append(threads.submit(judge, item))
                if len(running) == _IN_FLIGHT_PER_WORKER * self._workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()


def exact_match(gold: str, predicted: str) -> bool:
    """Whether texts are equal after trimming, dropping a trailing `;` and upper-casing."""
    return _bare(gold).upper() == _bare(predicted).upper()


def sql_metrics(scores: Sequence[SqlScore], seed: int = 0) -> dict[str, Metric]:
    """The metrics over judged queries: Wilson's intervals for shares, the bootstrap's for means.

    Args:
        scores: One per example whose gold query runs; without any there are no metrics. Without
            any of a gold query with rows there is no `execution_accuracy_with_rows`.
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
    """How many gold queries find nothing ("queries") or change nothing ("changes")."""
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
