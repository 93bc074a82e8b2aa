"""Figures of a study: the metric over rates, and quality against harm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from molf.errors import InputError
from molf.report.figures import Cell, Figure, Lines, Point, Points, Series, Table, plain
from molf.study.choice import HARMS
from molf.study.report.second_phase import FORGETTING
from molf.study.report.summary import CellSummary, front_of
from molf.study.report.tables import seeds_text

_LABELS = {
    FORGETTING: "change of forgetting_loss (nats per token)",
    "kl_neutral": "KL(base || tuned) on neutral text (nats per token)",
    "kl_task": "KL(base || tuned) on the task's prompts (nats per token)",
}


def figures_of(cell: CellSummary) -> Iterator[Figure]:
    """Yield the figures of a cell: its rates, and a front for each measure of harm."""
    if any(len(one.curve) > 1 for one in cell.methods):
        yield _rates(cell)
    yield from _fronts(cell)


def draw_figures(folder: Path, cells: Sequence[CellSummary]) -> dict[str, list[str]]:
    """Draw the figures of each cell as PNG files; return their names by cell.

    Args:
        folder: Where to write them.
        cells: The summary of the study.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "Figures need matplotlib, which is not installed. Run: pip install 'molf[study]', or "
            "give --no-figures."
        ) from error
    from molf.report.drawing import draw

    names: dict[str, list[str]] = {}
    for cell in cells:
        drawn = []
        if any(len(one.curve) > 1 for one in cell.methods):
            drawn += draw([_rates(cell)], folder, f"rates-{cell.name}", kinds=("png",))
        if fronts := list(_fronts(cell)):
            drawn += draw(fronts, folder, f"pareto-{cell.name}", kinds=("png",))
        names[cell.name] = [path.name for path in drawn]
    return names


def _rates(cell: CellSummary) -> Lines:
    rates = sorted({rate for one in cell.methods for rate in one.curve})
    series = [
        Series(one.name, np.array([one.curve.get(rate, np.nan) for rate in rates]), number)
        for number, one in enumerate(cell.methods)
        if one.curve
    ]
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (plain(rate), *(plain(one.values[row]) for one in series)) for row, rate in enumerate(rates)
    )
    best = "lowest" if cell.minimize else "highest"
    chosen = [
        f"{one.name} at {one.rates}" for one in cell.methods if one.curve and one.point is not None
    ]
    return Lines(
        name=f"rates-{cell.name}",
        title=f"{cell.metric} over rates: {cell.name}",
        text=f"Chosen, with the {best} mean over seeds: {'; '.join(chosen) or 'none yet'}. The "
        "rate is that of the LoRA factors where these alone are trained.",
        table=Table(("rate", *(one.name for one in series)), rows),
        x=np.array(rates),
        x_label="learning rate",
        y_label=f"{cell.metric} on the validation part",
        series=tuple(series),
        log_x=True,
        dotted=True,
    )


def _fronts(cell: CellSummary) -> Iterator[Points]:
    for harm in HARMS:
        shown = [one for one in cell.methods if one.value is not None and harm in one.harm]
        if not shown:
            continue
        points = tuple(
            Point(one.name + seeds_text(one), one.harm[harm], one.value)
            for one in shown
            if one.value is not None
        )
        front = front_of(cell, harm)
        numbers = [number for number, one in enumerate(shown) if one.name in front]
        numbers.sort(key=lambda number: points[number].x.value)
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (
                one.name,
                *(plain(value) for value in (one.x.value, one.x.low, one.x.high)),
                *(plain(value) for value in (one.y.value, one.y.low, one.y.high)),
            )
            for one in points
        )
        beaten = f"Not beaten in both: {', '.join(front)}. " if front else ""
        yield Points(
            name=f"pareto-{cell.name}-{harm}",
            title=f"{cell.metric} and {harm}: {cell.name}",
            text=f"{beaten}Lines are 95% intervals.",
            table=Table(("method", harm, "low", "high", cell.metric, "low", "high"), rows),
            points=points,
            x_label=_LABELS[harm],
            y_label=cell.metric,
            front=tuple(numbers),
        )
