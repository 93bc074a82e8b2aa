"""The rows of a cell's second phase, by method and rates, and their comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from molf.measure.estimates import (
    Estimate,
    SeedScores,
    by_metric,
    difference_of_questions,
    mean_of_questions,
    over_seeds,
)
from molf.study.choice import HARMS
from molf.study.definition import REPORT, Point
from molf.study.report.rates import rates_of
from molf.study.report.records import Row, is_complete

FORGETTING = "forgetting_loss"
MATCHED = 0.02
"""Shares of full updates that differ by more are not matched."""

Questions = Mapping[tuple[str, str, int, int], Mapping[str, Mapping[str, tuple[float, float]]]]
"""By method, phase, number of the point and seed: scores by metric and question."""


@dataclass(frozen=True)
class Assignments:
    """The assignments of a method hybrid at one setting of its rates.

    Attributes:
        full_weights: Mean share of the layers' weights in full.
        full_layers: Mean number of layers in full.
        kinds: Number of trials by `mixed`, `all full`, `all lora` or `all frozen`.
        keys: A hash of the assignment by seed; equal ones are equal.
    """

    full_weights: float
    full_layers: float
    kinds: Mapping[str, int]
    keys: Mapping[int, str]

    @property
    def is_one_class(self) -> bool:
        """Whether all layers have the same training in every trial."""
        return "mixed" not in self.kinds


@dataclass(frozen=True)
class Measured:
    """A method at one setting of its rates, on the test part.

    Attributes:
        method: The method.
        point: The rates.
        rows: Complete rows by seed.
        failed: Seeds whose trial failed.
        missing: Seeds without a trial so far.
    """

    method: str
    point: Point
    rows: Mapping[int, Row]
    failed: tuple[int, ...]
    missing: tuple[int, ...]

    @property
    def full_share(self) -> float | None:
        """Mean share of updates that the expert full took, of hybrid that of weights in full.

        None without both.
        """
        shares = [row["won/full"] for row in self.rows.values() if "won/full" in row]
        if not shares and self.assignments is not None:
            return self.assignments.full_weights
        return fmean(shares) if shares else None

    @property
    def assignments(self) -> Assignments | None:
        """The assignments of a method hybrid; None for others."""
        rows = {seed: row for seed, row in self.rows.items() if "assignment" in row}
        if not rows:
            return None
        return Assignments(
            fmean(row["full_weights"] for row in rows.values()),
            fmean(row["full_layers"] for row in rows.values()),
            Counter(row["assignment"] for row in rows.values()),
            {seed: row["assignment_key"] for seed, row in rows.items()},
        )

    def harm(self, name: str) -> dict[int, float]:
        """Return a measure of harm by seed; of forgetting, its change by the training.

        Empty if a row lacks it: without the worst seeds, whose measure is infinite, a mean would be
        too low.
        """
        before = f"before/{name}" if name == FORGETTING else None
        needed = {f"after/{name}", *filter(None, [before])}
        if not all(needed <= row.keys() for row in self.rows.values()):
            return {}
        return {
            seed: row[f"after/{name}"] - (row[before] if before else 0.0)
            for seed, row in self.rows.items()
        }


@dataclass(frozen=True)
class Comparison:
    """A paired difference between two methods on the test part, over common seeds.

    Attributes:
        other: The other method.
        estimate: This method's metric minus the other's.
        better: Seeds with a better value than the other method's.
        seeds: Common seeds.
        planned: Seeds of the study.
        point: This method's rates.
        other_point: The other's rates.
        full_share: Share of updates that this method's expert full took; None without it.
        other_share: The other's.
        harm: By metric of `HARMS`, this method's minus the other's.
    """

    other: str
    estimate: Estimate
    better: int
    seeds: int
    planned: int
    point: Point
    other_point: Point
    full_share: float | None
    other_share: float | None
    harm: Mapping[str, Estimate]

    @property
    def is_complete(self) -> bool:
        """Whether all seeds of the study are compared."""
        return self.seeds == self.planned

    @property
    def differs(self) -> bool:
        """Whether the comparison is complete and its interval excludes 0."""
        return self.is_complete and self.estimate.differs

    def outcome(self, *, minimize: bool) -> str:
        """Return `better`, `worse`, `no difference shown` or `incomplete`."""
        if not self.is_complete:
            return "incomplete"
        if not self.differs:
            return "no difference shown"
        return "better" if (self.estimate.value > 0) != minimize else "worse"

    @property
    def is_matched(self) -> bool:
        """Whether both shares of full updates are known and differ by at most `MATCHED`."""
        if self.full_share is None or self.other_share is None:
            return False
        return abs(self.full_share - self.other_share) <= MATCHED


@dataclass(frozen=True)
class Control:
    """A method against a control that is to have its share of full updates.

    Attributes:
        name: The control.
        own: Both at the rates that were chosen for each; None without rows.
        equal: Both at the rates that were chosen for the method; None without rows.
    """

    name: str
    own: Comparison | None
    equal: Comparison | None


class SecondPhase:
    """The rows of a cell's second phase.

    Args:
        rows: All rows of the cell.
        questions: Scores of questions of the cell.
        metric: Its metric.
        minimize: Whether a lower value is better.
        seeds: The planned seeds.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        questions: Questions,
        metric: str,
        minimize: bool,
        seeds: Sequence[int],
    ) -> None:
        self._rows = [row for row in rows if row["phase"] == REPORT]
        self._questions = questions
        self._metric = metric
        self._minimize = minimize
        self._seeds = tuple(seeds)

    def at(self, method: str, point: Point) -> Measured:
        """Return the rows of a method at these rates."""
        here = {
            row["seed"]: row
            for row in self._rows
            if row["method"] == method and rates_of(row) == point
        }
        complete = {
            seed: row
            for seed, row in sorted(here.items())
            if is_complete(row) and f"after/{self._metric}" in row
        }
        return Measured(
            method,
            point,
            complete,
            failed=tuple(sorted(here.keys() - complete.keys())),
            missing=tuple(seed for seed in self._seeds if seed not in here),
        )

    def base(self) -> float | None:
        """Return the mean of the metric before training; None without rows."""
        found = [row[name] for row in self._rows if (name := f"before/{self._metric}") in row]
        return fmean(found) if found else None

    def value(self, one: Measured) -> Estimate | None:
        """Return the metric; None without rows."""
        if not one.rows:
            return None
        found = mean_of_questions(self._metric, self._scores(one))
        return found or over_seeds(list(self._values(one).values()))

    def compare(self, one: Measured, other: Measured) -> Comparison | None:
        """Return the difference of two methods; None without a common seed."""
        mine, theirs = self._values(one), self._values(other)
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds:
            return None
        estimate = difference_of_questions(self._metric, self._scores(one), self._scores(other))
        if estimate is None:
            estimate = over_seeds([mine[seed] - theirs[seed] for seed in seeds])
        sign = -1 if self._minimize else 1
        harm = {}
        for name in HARMS:
            own, others = one.harm(name), other.harm(name)
            if common := sorted(own.keys() & others.keys()):
                harm[name] = over_seeds([own[seed] - others[seed] for seed in common])
        return Comparison(
            other=other.method,
            estimate=estimate,
            better=sum(sign * mine[seed] > sign * theirs[seed] for seed in seeds),
            seeds=len(seeds),
            planned=len(self._seeds),
            point=one.point,
            other_point=other.point,
            full_share=one.full_share,
            other_share=other.full_share,
            harm=harm,
        )

    def _values(self, one: Measured) -> dict[int, float]:
        return {seed: row[f"after/{self._metric}"] for seed, row in one.rows.items()}

    def _scores(self, one: Measured) -> dict[str, SeedScores]:
        return by_metric(
            {
                seed: self._questions.get((one.method, REPORT, row["point"], seed), {})
                for seed, row in one.rows.items()
            }
        )
