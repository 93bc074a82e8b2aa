"""Figures as data: the page, the drawings and the CSV files are made of the same values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from molf.measure.estimates import Estimate

Floats = npt.NDArray[np.float64]
Cell = str | int | float | None

MOST_POINTS = 1000  # of a line; longer ones are averaged in bins


@dataclass(frozen=True)
class Table:
    """A table of values; None is an empty cell.

    Attributes:
        columns: Names of the columns.
        rows: The rows.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: Its name.
        values: Values at the figure's x; NaN for a gap.
        color: Number of its colour.
        faint: Draw it thin and pale, behind the others.
    """

    name: str
    values: Floats
    color: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: Name of its files, and of the same figure of another run.
        title: Its heading.
        text: The reading of the figure in sentences, for those who do not see it as well.
        table: The values, or those of them that a reader may look up.
    """

    name: str
    title: str
    text: str
    table: Table


@dataclass(frozen=True)
class Lines(Figure):
    """Lines over steps, or over another number.

    Attributes:
        x: The common x, increasing.
        x_label: Its name.
        y_label: Name of the values, with their unit.
        series: The lines.
        y_range: Lowest and highest value of the axis; None for those of the values.
        stepped: Draw stairs, as for counts.
        has_own_table: Whether the table has other columns than x and the lines.
        log_x: Whether the axis of x is logarithmic.
        dotted: Whether values are dots as well, as where there are few.
    """

    x: Floats
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    y_range: tuple[float, float] | None = None
    stepped: bool = False
    has_own_table: bool = False
    log_x: bool = False
    dotted: bool = False


@dataclass(frozen=True)
class Heat(Figure):
    """A map of layers and time.

    Attributes:
        rows: Names of the rows.
        kinds: Kind of projection of each row.
        first: First step of each column: [C].
        last: Last step of each column: [C].
        values: Shares of the experts [E, R, C], or margins from -1 to 1 [1, R, C]; NaN without
            a decision.
        names: Names of the experts; of the margins, those at 1 and at -1.
        is_margin: Whether the values are margins.
        factors: For margins whose rates can be changed: the factors of the LoRA rate: [F].
        full_at: The share of each layer's decisions that `full` wins at each factor: [L, F].
        rate_ratio: LoRA rate divided by the rate of `full`, as recorded.
    """

    rows: tuple[str, ...]
    kinds: tuple[str, ...]
    first: Sequence[int]
    last: Sequence[int]
    values: Floats
    names: tuple[str, ...]
    is_margin: bool = False
    factors: Floats | None = None
    full_at: Floats | None = None
    rate_ratio: float = 1.0


@dataclass(frozen=True)
class Bars(Figure):
    """Shares of several parts in each group, stacked to 1 (or to the number of winners).

    Attributes:
        groups: Names of the groups.
        parts: Names of the parts.
        values: The shares: [G, P].
        label: Name of the values.
    """

    groups: tuple[str, ...]
    parts: tuple[str, ...]
    values: Floats
    label: str


@dataclass(frozen=True)
class Point:
    """One point with its intervals.

    Attributes:
        name: Its name.
        x: Value and interval along x; ends are NaN where they are unknown.
        y: The same along y.
    """

    name: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Points(Figure):
    """Points of two values with intervals, and those that no other one beats.

    Attributes:
        points: The points.
        x_label: Name of the values along x, with their unit.
        y_label: Name of the values along y, with their unit.
        front: Numbers of the points that no other one beats, by increasing x.
    """

    points: tuple[Point, ...]
    x_label: str
    y_label: str
    front: tuple[int, ...]


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        name: Anchor of the heading.
        title: The heading.
        figures: The figures.
        text: Sentences before the figures.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    text: tuple[str, ...] = field(default=())


def lines(
    name: str,
    title: str,
    text: str,
    x: Floats,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    y_label: str,
    y_range: tuple[float, float] | None = None,
    stepped: bool = False,
) -> Lines:
    """Return lines of at most `MOST_POINTS` points, with their table.

    Longer ones become the means of bins of equal numbers of points.
    """
    per_point = -(-len(x) // MOST_POINTS) if len(x) else 1
    if per_point > 1:
        x = binned(x, per_point, last=True)
        series = [
            Series(one.name, binned(one.values, per_point), one.color, one.faint) for one in series
        ]
        text = f"{text} Each point is the mean of {per_point} values."
    rows = tuple((plain(x[i]), *(plain(one.values[i]) for one in series)) for i in range(len(x)))
    table = Table((x_label, *(one.name for one in series)), rows)
    return Lines(
        name, title, text.strip(), table, x, x_label, y_label, tuple(series), y_range, stepped
    )


def binned(values: Floats, size: int, *, last: bool = False) -> Floats:
    """Return the means of bins of `size` values, NaN left out; or the last value of each bin."""
    padded = np.full(-(-len(values) // size) * size, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(-1, size)
    if last:
        return np.asarray([row[~np.isnan(row)][-1] for row in rows])
    known = ~np.isnan(rows)
    total, count = np.where(known, rows, 0).sum(axis=1), known.sum(axis=1)
    return np.divide(total, count, out=np.full(len(rows), np.nan), where=count > 0)


def smoothed(values: Floats, span: int) -> Floats:
    """Return the exponential moving average over about `span` values; NaN stays NaN.

    The first values are weighted without a bias towards the start.
    """
    decay, total, weight, made = 1 - 2 / (span + 1), 0.0, 0.0, []
    for value in values:
        if math.isnan(value):
            made.append(math.nan)
            continue
        total, weight = decay * total + value, decay * weight + 1
        made.append(total / weight)
    return np.array(made, dtype=np.float64)


def plain(value: float | None) -> Cell:
    """Return a number of 6 significant digits, an integer if it is one; None for NaN."""
    if value is None or not math.isfinite(value):
        return None
    number = float(f"{value:.6g}") if abs(value) < 1e6 else float(value)
    return int(number) if number.is_integer() and abs(number) < 1e15 else number
