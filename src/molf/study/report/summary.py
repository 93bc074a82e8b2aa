"""What the rows of a study say about each method in each cell."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from molf.study.definition import CHOOSE, LEARNING_RATE, LORA_RATE, RATIO, REPORT, point_text
from molf.study.report.records import Records, Row, is_complete
from molf.study.report.statistics import (
    Estimate,
    SeedScores,
    Sensitivity,
    difference_of_questions,
    mean_of_questions,
    over_seeds,
    pareto_front,
    sensitivity,
)

FORGETTING = "forgetting_loss"
HARMS = (FORGETTING, "kl_neutral", "kl_task")


@dataclass(frozen=True)
class Comparison:
    """A difference to another method at the chosen rates, over common seeds.

    Attributes:
        other: The other method.
        estimate: This method's metric minus the other's.
        better: Seeds with a better value than the other method's.
        seeds: Common seeds.
    """

    other: str
    estimate: Estimate
    better: int
    seeds: int


@dataclass
class MethodSummary:
    """A method in a cell.

    Attributes:
        name: The method.
        point: The chosen rates; None before the first phase is over, or if every rate failed.
        chosen_value: Mean of the metric in the first phase at these rates.
        value: The metric in the second phase; None without rows.
        seeds: Seeds of the second phase with rows.
        harm: By metric of `HARMS`, its mean in the second phase (of forgetting: the change).
        comparison: The difference to the baseline; None for the baseline itself.
        control_of: The method whose share of full updates this one has; None for others.
        curve: The metric by rate in the first phase, at the chosen ratio.
        sensitivity: Its dependence on the rate.
        full_share: Mean share of updates that the expert full took; None without it.
        trials: Ended trials of both phases.
        seconds: Their seconds.
        flops: Their estimated floating-point operations in training.
        missing: Texts that name missing rows.
        failures: Texts of failed trials.
    """

    name: str
    point: dict[str, float] | None = None
    chosen_value: float = math.nan
    value: Estimate | None = None
    seeds: tuple[int, ...] = ()
    harm: dict[str, Estimate] = field(default_factory=dict)
    comparison: Comparison | None = None
    control_of: str | None = None
    curve: dict[float, float] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    full_share: float | None = None
    trials: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    missing: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def rates(self) -> str:
        """The chosen rates as text."""
        return "" if self.point is None else point_text(self.point).replace("-lora", " lora")


@dataclass
class CellSummary:
    """A cell.

    Attributes:
        name: The cell.
        about: Its description.
        metric: The metric of its comparisons.
        minimize: Whether a lower value is better.
        base: The metric before training, on the test part; None without rows.
        baseline: The method that others are compared with; None before it is known.
        methods: The methods in the order of the study.
        controls: Differences of methods to their share-matched controls, by method.
    """

    name: str
    about: str
    metric: str
    minimize: bool
    base: float | None
    baseline: str | None
    methods: list[MethodSummary]
    controls: dict[str, list[Comparison]]

    @property
    def trials(self) -> int:
        """Number of ended trials."""
        return sum(method.trials for method in self.methods)


def summarise(records: Records) -> list[CellSummary]:
    """Return a summary of each cell."""
    return [_Cell(records, name).summary() for name in records.outline["cells"]]


class _Cell:
    def __init__(self, records: Records, name: str) -> None:
        self._outline = records.outline
        self._entry = records.outline["cells"][name]
        self._name = name
        self._metric = f"after/{self._entry['metric']}"
        self._minimize = bool(self._entry["minimize"])
        self._questions = records.questions.get(name, {})
        self._rows = [row for row in records.rows if row["cell"] == name]
        self._worst = self._worst_value()

    def summary(self) -> CellSummary:
        """Return the summary of the cell."""
        methods = [self._method(name) for name in self._outline["methods"]]
        known = {one.name: one for one in methods}
        baseline = self._baseline(known)
        for one in methods:
            if baseline is not None and one.name != baseline:
                one.comparison = self._compare(one, known[baseline])
        controls = {}
        for one in methods:
            of = [other for other in methods if other.control_of == one.name]
            found = [comparison for other in of if (comparison := self._compare(one, other))]
            if found:
                controls[one.name] = found
        before = [
            row[f"before/{self._entry['metric']}"]
            for row in self._rows
            if row["phase"] == REPORT and f"before/{self._entry['metric']}" in row
        ]
        return CellSummary(
            name=self._name,
            about=str(self._entry.get("about") or ""),
            metric=self._entry["metric"],
            minimize=self._minimize,
            base=fmean(before) if before else None,
            baseline=baseline,
            methods=methods,
            controls=controls,
        )

    def _worst_value(self) -> float:
        """Return the worst value that any method has in the first phase: that of a failed trial."""
        values = [r[self._metric] for r in self._rows if is_complete(r) and self._metric in r]
        return (max if self._minimize else min)(values, default=math.nan)

    def _baseline(self, methods: dict[str, MethodSummary]) -> str | None:
        """Return the best method of `report.baseline` by the first phase."""
        sign = 1 if self._minimize else -1
        known = [
            methods[name]
            for name in self._outline["report"]["baseline"]
            if methods[name].value is not None
        ]
        best = min(known, key=lambda one: sign * one.chosen_value, default=None)
        return None if best is None else best.name

    def _method(self, name: str) -> MethodSummary:
        rows = [row for row in self._rows if row["method"] == name]
        summary = MethodSummary(name, control_of=self._control_of(name))
        summary.trials = len(rows)
        summary.seconds = sum(row.get("seconds", 0.0) for row in rows)
        summary.flops = sum(row.get("training_flops", 0.0) for row in rows)
        summary.failures = [
            f"{row['phase']} {point_text(_point(row))} seed {row['seed']}: "
            f"{row.get('error') or row['state']}"
            for row in rows
            if not is_complete(row)
        ]
        self._add_choice(summary, [row for row in rows if row["phase"] == CHOOSE])
        self._add_report(summary, [row for row in rows if row["phase"] == REPORT])
        return summary

    def _control_of(self, name: str) -> str | None:
        """Return the method whose number of full updates this one has, or None."""
        methods = self._outline["methods"]
        if methods[name].get("share_of"):
            return str(methods[name]["share_of"])
        score = str(methods[name]["options"].get("score", ""))
        if not score.startswith("shuffled:"):
            return None
        for other, entry in methods.items():
            if entry["options"].get("method", "molf") == "molf" and (
                entry["options"].get("score", "epd") == score.removeprefix("shuffled:")
            ):
                return str(other)
        return None

    def _add_choice(self, summary: MethodSummary, rows: list[Row]) -> None:
        seeds = self._outline["choose"]["seeds"]
        expected = self._entry["points"][summary.name] * len(seeds)
        if len(rows) < expected:
            summary.missing.append(f"{expected - len(rows)} of {expected} rate trials")
        values: dict[int, list[float]] = {}
        points: dict[int, dict[str, float]] = {}
        for row in rows:
            value = row.get(self._metric, math.nan) if is_complete(row) else math.nan
            values.setdefault(row["point"], []).append(value)
            points[row["point"]] = _point(row)
        whole = {point: fmean(found) for point, found in values.items() if len(found) == len(seeds)}
        means = {point: mean for point, mean in whole.items() if not math.isnan(mean)}
        if not means or len(rows) < expected:
            return
        sign = 1 if self._minimize else -1
        best = min(means, key=lambda point: (sign * means[point], point))
        summary.point, summary.chosen_value = points[best], means[best]
        ratio = points[best].get(RATIO)
        for point, mean in whole.items():
            rates = points[point]
            if rates.get(RATIO) == ratio and rates:
                rate = rates.get(LEARNING_RATE, rates.get(LORA_RATE, math.nan))
                summary.curve[rate] = self._worst if math.isnan(mean) else mean
        summary.sensitivity = sensitivity(summary.curve, minimize=self._minimize)

    def _add_report(self, summary: MethodSummary, rows: list[Row]) -> None:
        if summary.point is None and not rows:
            summary.missing.append(f"all {len(self._outline['report']['seeds'])} seeds")
            return
        found = {row["seed"]: row for row in rows if is_complete(row) and self._metric in row}
        lacking = [seed for seed in self._outline["report"]["seeds"] if seed not in found]
        if lacking:
            summary.missing.append(f"seeds {', '.join(map(str, lacking))}")
        if not found:
            return
        summary.seeds = tuple(sorted(found))
        summary.value = mean_of_questions(self._entry["metric"], self._scores(summary))
        if summary.value is None:
            summary.value = over_seeds([found[seed][self._metric] for seed in summary.seeds])
        for harm in HARMS:
            values = [
                row[f"after/{harm}"]
                - (row.get(f"before/{harm}", 0.0) if harm == FORGETTING else 0.0)
                for row in found.values()
                if f"after/{harm}" in row
            ]
            if values:
                summary.harm[harm] = over_seeds(values)
        shares = [row["won/full"] for row in found.values() if "won/full" in row]
        summary.full_share = fmean(shares) if shares else None

    def _scores(self, summary: MethodSummary) -> dict[str, SeedScores]:
        """Return the scores of questions in the second phase, by metric and seed."""
        found: dict[str, dict[int, Any]] = {}
        for (method, phase, _, seed), scores in self._questions.items():
            if method == summary.name and phase == REPORT and seed in summary.seeds:
                for metric, questions in scores.items():
                    found.setdefault(metric, {})[seed] = questions
        return dict(found)

    def _compare(self, one: MethodSummary, other: MethodSummary) -> Comparison | None:
        mine, theirs = self._values(one), self._values(other)
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds:
            return None
        estimate = difference_of_questions(
            self._entry["metric"], self._scores(one), self._scores(other)
        )
        if estimate is None:
            estimate = over_seeds([mine[seed] - theirs[seed] for seed in seeds])
        sign = -1 if self._minimize else 1
        better = sum(sign * mine[seed] > sign * theirs[seed] for seed in seeds)
        return Comparison(other.name, estimate, better, len(seeds))

    def _values(self, summary: MethodSummary) -> dict[int, float]:
        return {
            row["seed"]: row[self._metric]
            for row in self._rows
            if row["method"] == summary.name
            and row["phase"] == REPORT
            and is_complete(row)
            and self._metric in row
        }


def _point(row: Row) -> dict[str, float]:
    names = (LEARNING_RATE, RATIO) if RATIO in row else (LEARNING_RATE, LORA_RATE)
    return {name: row[name] for name in names if name in row}


def front_of(cell: CellSummary, harm: str) -> list[str]:
    """Return the methods on the Pareto front of the cell's metric against a measure of harm."""
    sign = -1 if cell.minimize else 1
    points = {
        one.name: (one.harm[harm].value, sign * one.value.value)
        for one in cell.methods
        if one.value is not None and harm in one.harm
    }
    return pareto_front(points)
