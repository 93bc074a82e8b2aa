"""Means over seeds, paired differences, and the best methods, for each metric of a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from molf.compare.cells import Cell
from molf.compare.runs import COSTS, ComparedRun
from molf.measure.estimates import (
    Estimate,
    SeedScores,
    by_metric,
    difference_of_questions,
    mean_of_questions,
    minus_best_of_questions,
    minus_best_over_seeds,
    over_seeds,
)
from molf.measure.meanings import is_lower_better, is_ranked

BEST, CLOSE, UNKNOWN, WORSE = "best", "close", "unknown", ""
"""Places of a method: the best mean; not distinguishable from it; no interval; worse."""

FORGETTING = "forgetting"
"""The change of `forgetting_loss` by the training."""

_HELD_OUT = "forgetting_loss"
_MOLF = ("molf", "molf-e")


@dataclass(frozen=True)
class MethodValue:
    """A metric of one method.

    Attributes:
        value: Its mean over seeds.
        seeds: The seeds.
        place: `BEST`, `CLOSE`, `UNKNOWN` or `WORSE`; `WORSE` also for a metric without a direction.
        behind: The paired difference to the best method; None for the best, and without a common
            seed.
    """

    value: Estimate
    seeds: tuple[int, ...]
    place: str
    behind: Estimate | None


@dataclass(frozen=True)
class MetricSummary:
    """A metric of a cell.

    Attributes:
        name: The metric; `FORGETTING`; or one of `COSTS`.
        minimize: Whether a lower value is better.
        is_ranked: Whether higher or lower is better at all.
        methods: By name, the methods that have it.
        margins: By name of a MoLF method, its value minus the best of fft and LoRA; empty for
            costs, and without runs of both.
    """

    name: str
    minimize: bool
    is_ranked: bool
    methods: Mapping[str, MethodValue]
    margins: Mapping[str, Estimate]


@dataclass(frozen=True)
class CellSummary:
    """The metrics of a cell.

    Attributes:
        cell: The runs.
        metrics: The metrics in the order of the evaluation, then costs.
    """

    cell: Cell
    metrics: tuple[MetricSummary, ...]

    def metric(self, name: str) -> MetricSummary | None:
        """Return a metric; None if no run has it."""
        return next((one for one in self.metrics if one.name == name), None)


def summarise(cells: Sequence[Cell]) -> list[CellSummary]:
    """Return the summary of each cell."""
    return [_summary(cell) for cell in cells]


def _summary(cell: Cell) -> CellSummary:
    runs = [run for seeds in cell.methods.values() for run in seeds.values()]
    names = dict.fromkeys(name for run in runs for name in run.after)
    if any(FORGETTING in _changes(run) for run in runs):
        names[FORGETTING] = None
    names |= dict.fromkeys(name for name in COSTS if any(name in run.costs for run in runs))
    return CellSummary(cell, tuple(_metric(cell, name) for name in names))


def _metric(cell: Cell, name: str) -> MetricSummary:
    minimize = is_lower_better(name) or name == FORGETTING or name in COSTS
    ranked = is_ranked(name)
    values = {method: _values(runs.values(), name) for method, runs in cell.methods.items()}
    values = {method: found for method, found in values.items() if found}
    scores = {
        method: by_metric({seed: run.scores for seed, run in cell.methods[method].items()})
        for method in values
    }
    means = {method: _mean(name, values[method], scores[method]) for method in values}
    sign = 1 if minimize else -1
    best = min(means, key=lambda method: sign * means[method].value)
    methods = {}
    for method, mean in means.items():
        behind = None
        if method != best:
            behind = _difference(name, method, best, values, scores)
        place = _place(method == best, behind) if ranked and len(means) > 1 else WORSE
        methods[method] = MethodValue(mean, tuple(values[method]), place, behind)
    margins = {}
    others = [one for method in ("fft", "lora") for one in cell.of(method) if one in values]
    both = all(any(one in values for one in cell.of(method)) for method in ("fft", "lora"))
    if ranked and both and name not in COSTS:
        for method in (one for kind in _MOLF for one in cell.of(kind) if one in values):
            if found := _margin(name, method, others, values, scores, minimize):
                margins[method] = found
    return MetricSummary(name, minimize, ranked, methods, margins)


def _place(is_best: bool, behind: Estimate | None) -> str:
    if is_best:
        return BEST
    if behind is None or math.isnan(behind.low):
        return UNKNOWN
    return WORSE if behind.differs else CLOSE


def _values(runs: Iterable[ComparedRun], name: str) -> dict[int, float]:
    found = {}
    for run in runs:
        value = {**run.after, **run.costs, **_changes(run)}.get(name)
        if value is not None:
            found[run.seed] = value
    return found


def _changes(run: ComparedRun) -> dict[str, float]:
    if _HELD_OUT in run.before and _HELD_OUT in run.after:
        return {FORGETTING: run.after[_HELD_OUT] - run.before[_HELD_OUT]}
    return {}


Scores = dict[str, SeedScores]


def _mean(name: str, values: Mapping[int, float], scores: Scores) -> Estimate:
    found = mean_of_questions(name, scores, one_seed=True)
    return found or over_seeds(list(values.values()))


def _difference(
    name: str,
    one: str,
    other: str,
    values: Mapping[str, Mapping[int, float]],
    scores: Mapping[str, Scores],
) -> Estimate | None:
    if name == COSTS[0]:  # of parameters, not measured: exact for one seed as well
        change = fmean(values[one].values()) - fmean(values[other].values())
        return Estimate(change, change, change, "seeds")
    found = difference_of_questions(name, scores[one], scores[other], one_seed=True)
    return found or minus_best_over_seeds(values[one], [values[other]], minimize=False)


def _margin(
    name: str,
    one: str,
    others: Sequence[str],
    values: Mapping[str, Mapping[int, float]],
    scores: Mapping[str, Scores],
    minimize: bool,
) -> Estimate | None:
    of_others = [scores[other] for other in others]
    found = minus_best_of_questions(name, scores[one], of_others, minimize=minimize, one_seed=True)
    return found or minus_best_over_seeds(
        values[one], [values[other] for other in others], minimize=minimize
    )
