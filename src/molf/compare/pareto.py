"""Figures of two metrics of a comparison: methods that no other one beats in both."""

from __future__ import annotations

import re
from collections.abc import Sequence

from molf.compare.runs import COSTS
from molf.compare.summary import FORGETTING, CellSummary, MetricSummary
from molf.compare.texts import LABELS
from molf.errors import InputError
from molf.measure.estimates import Estimate, pareto_front
from molf.measure.meanings import main_metric
from molf.report.figures import Cell, Point, Points, Table, plain
from molf.shown import suggestion

_MIB = 2**20


def check_pareto(given: str | None, summaries: Sequence[CellSummary]) -> tuple[str, str] | None:
    """Return the two metrics of the figures; None if no two are known.

    Args:
        given: Two names with a comma; None for the main metric over forgetting, or over the
            trained parameters.
        summaries: The comparison.

    Raises:
        InputError: The text has not two names, or one is not known or has no direction.
    """
    known = dict.fromkeys(one.name for found in summaries for one in found.metrics if one.is_ranked)
    if given is None:
        x = next((name for name in (FORGETTING, COSTS[0]) if name in known), None)
        y = main_metric(known)
        return None if x is None or y is None or x == y else (x, y)
    names = [name.strip() for name in given.split(",")]
    if len(names) != 2 or not all(names) or names[0] == names[1]:
        raise InputError(
            f"Invalid pareto={given!r}. Give two different metrics with a comma: X,Y of "
            f"{', '.join(known)}."
        )
    for name in names:
        if name not in known:
            raise InputError(
                f"Invalid pareto={given!r}: no run has a metric {name!r} with a direction."
                f"{suggestion(name, known)} Must be two of {', '.join(known)}."
            )
    return names[0], names[1]


def pareto_figure(found: CellSummary, names: tuple[str, str]) -> Points | None:
    """Return the figure of a cell; None with fewer than two methods that have both metrics.

    Args:
        found: The summary of the cell.
        names: The metrics along x and y.
    """
    x, y = (found.metric(name) for name in names)
    if x is None or y is None:
        return None
    methods = [method for method in x.methods if method in y.methods]
    if len(methods) < 2:
        return None
    points = tuple(Point(method, _scaled(x, method), _scaled(y, method)) for method in methods)
    # The front is of (lower is better, higher is better).
    signs = (1 if x.minimize else -1, -1 if y.minimize else 1)
    front = pareto_front(
        {one.name: (signs[0] * one.x.value, signs[1] * one.y.value) for one in points}
    )
    numbers = [number for number, one in enumerate(points) if one.name in front]
    numbers.sort(key=lambda number: (points[number].x.value, points[number].y.value))
    labels = _label(x), _label(y)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            one.name,
            *(plain(value) for value in (one.x.value, one.x.low, one.x.high)),
            *(plain(value) for value in (one.y.value, one.y.low, one.y.high)),
            "yes" if one.name in front else "no",
        )
        for one in points
    )
    text = (
        f"Not beaten in both {x.name} and {y.name}: {', '.join(front)}. Lines are 95% intervals; "
        "the dotted line joins these methods."
    )
    return Points(
        name=f"pareto-{re.sub(r'[^A-Za-z0-9._-]+', '-', found.cell.name)}",
        title=f"{y.name} and {x.name}: {found.cell.name}",
        text=text,
        table=Table(("method", x.name, "low", "high", y.name, "low", "high", "not beaten"), rows),
        points=points,
        x_label=labels[0],
        y_label=labels[1],
        front=tuple(numbers),
    )


def _scaled(metric: MetricSummary, method: str) -> Estimate:
    found = metric.methods[method].value
    if metric.name != "peak_memory_bytes":
        return found
    return Estimate(found.value / _MIB, found.low / _MIB, found.high / _MIB, found.units)


def _label(metric: MetricSummary) -> str:
    better = "lower" if metric.minimize else "higher"
    return f"{LABELS.get(metric.name, metric.name)} ({better} is better)"
