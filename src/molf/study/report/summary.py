"""The rows of a study, summarised for each method in each cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from molf.measure.estimates import Estimate, over_seeds, pareto_front
from molf.study.assigning.rule import Rule
from molf.study.choice import HARMS, choose_point, point_means
from molf.study.definition import CHOOSE, Point
from molf.study.plan import PRUNED
from molf.study.report.rates import curve_points, edges, rates_of, rates_text, tried_names
from molf.study.report.records import Records, Row, is_complete
from molf.study.report.second_phase import (
    Assignments,
    Comparison,
    Control,
    Measured,
    SecondPhase,
)
from molf.study.report.sensitivity import Sensitivity, sensitivity


@dataclass
class MethodSummary:
    """A method in a cell.

    Attributes:
        name: The method.
        point: The chosen rates; None before the first phase is over, or if every rate failed.
        edges: The rates of these that are the lowest or the highest tried, with that text.
        chosen_value: Mean of the metric in the first phase at these rates.
        value: The metric in the second phase; None without rows.
        seeds: Seeds of the second phase with rows.
        planned_seeds: Number of seeds that the study plans.
        failed_seeds: Seeds of the second phase whose trial failed.
        harm: By metric of `HARMS`, its mean in the second phase (of forgetting: the change).
        comparison: The difference to the baseline; None for the baseline itself.
        control_of: The method whose share of full updates this one should have; None for others.
        tried: The lowest and the highest main rate of the first phase; None without rows.
        curve: The metric by main rate in the first phase; other rates are the chosen ones.
        sensitivity: Its dependence on the rate.
        pruned: Rates left out of the curve, because a trial was ended early.
        full_share: Mean share of updates that the expert full took, of hybrid that of weights in
            full; None without both.
        options: Options of the method.
        rule: How its assignments are made; None without a rule.
        assignments: Its assignments at the chosen rates; None for others than hybrid.
        trials: Ended trials of both phases.
        seconds: Their seconds.
        flops: Their estimated floating-point operations in training.
        trained: Parameters with optimizer state; None without rows.
        moved: Those of them that an update changed in any of the rows; None where unknown.
        missing: Texts that name missing rows.
        failures: Texts of failed and pruned trials.
    """

    name: str
    point: Point | None = None
    edges: dict[str, str] = field(default_factory=dict)
    chosen_value: float = math.nan
    value: Estimate | None = None
    seeds: tuple[int, ...] = ()
    planned_seeds: int = 0
    failed_seeds: tuple[int, ...] = ()
    harm: dict[str, Estimate] = field(default_factory=dict)
    comparison: Comparison | None = None
    control_of: str | None = None
    tried: tuple[float, float] | None = None
    curve: dict[float, float] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    pruned: list[str] = field(default_factory=list)
    full_share: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: Rule | None = None
    assignments: Assignments | None = None
    trials: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    trained: int | None = None
    moved: int | None = None
    missing: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether the second phase has a row of every planned seed."""
        return 0 < self.planned_seeds == len(self.seeds)

    @property
    def rates(self) -> str:
        """The chosen rates as text, those at the edge of the tried ones marked."""
        return "" if self.point is None else rates_text(self.point, self.edges)


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
        controls: Methods against their controls, by method.
        second: The rows of its second phase.
    """

    name: str
    about: str
    metric: str
    minimize: bool
    base: float | None
    baseline: str | None
    methods: list[MethodSummary]
    controls: dict[str, list[Control]]
    second: SecondPhase = field(repr=False)

    @property
    def trials(self) -> int:
        """Number of ended trials."""
        return sum(method.trials for method in self.methods)

    def method(self, name: str) -> MethodSummary | None:
        """Return the method of a name; None without it."""
        return next((one for one in self.methods if one.name == name), None)

    def compare(self, one: MethodSummary, other: MethodSummary) -> Comparison | None:
        """Return the difference of two methods at the rates chosen for each; None without rows."""
        return _compare(self.second, one, other)


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
        self._rows = [row for row in records.rows if row["cell"] == name]
        self._worst = self._worst_value()
        self._seeds: list[int] = self._outline["report"]["seeds"]
        questions = records.questions.get(name, {})
        self._second = SecondPhase(
            self._rows, questions, self._entry["metric"], self._minimize, self._seeds
        )

    def summary(self) -> CellSummary:
        """Return the summary of the cell."""
        methods = [self._method(name) for name in self._outline["methods"]]
        known = {one.name: one for one in methods}
        baseline = self._baseline(known)
        for one in methods:
            if baseline is not None and one.name != baseline:
                one.comparison = _compare(self._second, one, known[baseline])
        controls = {}
        for one in methods:
            of = [self._control(one, other) for other in methods if other.control_of == one.name]
            if found := [control for control in of if control.own or control.equal]:
                controls[one.name] = found
        return CellSummary(
            name=self._name,
            about=str(self._entry.get("about") or ""),
            metric=self._entry["metric"],
            minimize=self._minimize,
            base=self._second.base(),
            baseline=baseline,
            methods=methods,
            controls=controls,
            second=self._second,
        )

    def _worst_value(self) -> float:
        """Return the worst value of any method on the validation part: that of a failed trial."""
        values = [
            row[self._metric]
            for row in self._rows
            if row["phase"] == CHOOSE and is_complete(row) and self._metric in row
        ]
        return (max if self._minimize else min)(values, default=math.nan)

    def _baseline(self, methods: dict[str, MethodSummary]) -> str | None:
        """Return the best method of `report.baseline` by the first phase; None before its end."""
        sign = 1 if self._minimize else -1
        named = [methods[name] for name in self._outline["report"]["baseline"]]
        if any(one.point is None and one.missing for one in named):
            return None
        known = [one for one in named if one.point is not None]
        best = min(known, key=lambda one: sign * one.chosen_value, default=None)
        return None if best is None else best.name

    def _method(self, name: str) -> MethodSummary:
        rows = [row for row in self._rows if row["method"] == name]
        entry = self._outline["methods"][name]
        summary = MethodSummary(name, control_of=entry.get("control_of") or entry.get("share_of"))
        summary.options = entry.get("options") or {}
        if entry.get("assignment"):
            summary.rule = Rule.from_values(entry["assignment"])
        summary.planned_seeds = len(self._seeds)
        summary.trials = len(rows)
        summary.seconds = sum(row.get("seconds", 0.0) for row in rows)
        summary.flops = sum(row.get("training_flops", 0.0) for row in rows)
        summary.trained = _most(rows, "trained_parameters")
        summary.moved = _most(rows, "moved_parameters")
        summary.failures = [
            f"{row['phase']} {rates_text(rates_of(row))} seed {row['seed']}: "
            f"{row.get('error') or row['state']}"
            for row in rows
            if not is_complete(row)
        ]
        self._add_choice(summary, [row for row in rows if row["phase"] == CHOOSE])
        self._add_second(summary)
        return summary

    def _expected(self, name: str) -> int:
        """Return the number of a method's rate trials; 0 for a control of a share that is unknown.

        That is so where every rate trial of its method failed.
        """
        count = int(self._entry["points"][name]) * len(self._outline["choose"]["seeds"])
        model = self._outline["methods"][name].get("share_of")
        if model:
            rows = [r for r in self._rows if r["method"] == model and r["phase"] == CHOOSE]
            if len(rows) >= self._expected(model) and not any("won/full" in row for row in rows):
                return 0
        return count

    def _add_choice(self, summary: MethodSummary, rows: list[Row]) -> None:
        expected = self._expected(summary.name)
        values: dict[int, list[float]] = {}
        points: dict[int, Point] = {}
        for row in rows:
            value = row.get(self._metric, math.nan) if is_complete(row) else math.nan
            values.setdefault(row["point"], []).append(value)
            points[row["point"]] = rates_of(row)
        names = tried_names(self._outline, self._name, summary.name)
        main = [point[names[0]] for point in points.values() if names[0] in point]
        summary.tried = (min(main), max(main)) if main else None
        if len(rows) < expected:
            summary.missing.append(f"{expected - len(rows)} of {expected} rate trials")
            return
        chosen = choose_point(values, minimize=self._minimize)
        if chosen is None:
            return
        summary.point, summary.chosen_value = points[chosen.index], chosen.value
        summary.edges = edges(points, chosen.index, names)
        pruned = {row["point"] for row in rows if row["state"] == PRUNED}
        summary.pruned = [rates_text(points[index]) for index in sorted(pruned)]
        means = point_means(values)
        for rate, index in curve_points(points, chosen.index, names).items():
            if index not in pruned:
                mean = means[index]
                summary.curve[rate] = self._worst if math.isnan(mean) else mean
        center = summary.point[names[0]]
        summary.sensitivity = sensitivity(summary.curve, center, minimize=self._minimize)

    def _add_second(self, summary: MethodSummary) -> None:
        if summary.point is None:
            if summary.missing:
                summary.missing.append(f"all {len(self._seeds)} seeds")
            return
        found = self._second.at(summary.name, summary.point)
        if found.missing:
            summary.missing.append(f"seeds {_listed(found.missing)}")
        summary.seeds, summary.failed_seeds = tuple(found.rows), found.failed
        summary.value = self._second.value(found)
        for harm in HARMS:
            if values := found.harm(harm):
                summary.harm[harm] = over_seeds(list(values.values()))
        summary.full_share = found.full_share
        summary.assignments = found.assignments

    def _control(self, one: MethodSummary, control: MethodSummary) -> Control:
        equal = None
        if one.point is not None:
            there: Measured = self._second.at(control.name, one.point)
            equal = self._second.compare(self._second.at(one.name, one.point), there)
            if control.point not in (None, one.point) and there.missing:
                at = f"at the rates of {one.name}"
                control.missing.append(f"seeds {_listed(there.missing)} {at}")
        return Control(control.name, _compare(self._second, one, control), equal)


def _compare(second: SecondPhase, one: MethodSummary, other: MethodSummary) -> Comparison | None:
    if one.point is None or other.point is None:
        return None
    return second.compare(second.at(one.name, one.point), second.at(other.name, other.point))


def _most(rows: list[Row], name: str) -> int | None:
    found = [int(row[name]) for row in rows if name in row]
    return max(found) if found else None


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def front_of(cell: CellSummary, harm: str) -> list[str]:
    """Return the methods on the Pareto front of the cell's metric against a measure of harm.

    Methods that lack seeds are left out. Empty for fewer than two methods.
    """
    sign = -1 if cell.minimize else 1
    points = {
        one.name: (one.harm[harm].value, sign * one.value.value)
        for one in cell.methods
        if one.value is not None and harm in one.harm and one.is_complete
    }
    return pareto_front(points) if len(points) > 1 else []
