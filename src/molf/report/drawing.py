"""Draw figures with matplotlib, and write their values as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molf.colors import COLORS, EMPTY
from molf.disk.files import replacing_file
from molf.measure.estimates import Estimate
from molf.report.figures import Bars, Cell, Figure, Heat, Lines, Points, Table, plain

_MARKERS = "osDv^<>Phd*"
_LABELS = 40  # of rows of a map


def write_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Draw a figure, and write its values as CSV; return the paths.

    Args:
        figure: The figure.
        folder: Where to write the files.
        name: Their name without ending.

    Raises:
        OSError: They cannot be written.
    """
    written = draw([figure], folder, name)
    for ending, table in _tables(figure):
        written.append(write_table(table, folder / f"{name}{ending}.csv"))
    return written


def draw(
    figures: Sequence[Figure], folder: Path, name: str, *, kinds: Sequence[str] = ("png", "svg")
) -> list[Path]:
    """Draw figures beside each other; return the paths.

    Args:
        figures: At least one; several have one legend.
        folder: Where to write the files.
        name: Their name without ending.
        kinds: Formats of the drawings.

    Raises:
        OSError: They cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    width, height = _size(figures[0])
    if len(figures) > 1:
        width = 4.5 * len(figures) + 1.5
    drawing = Drawing(figsize=(width, height), layout="constrained")
    axes = drawing.subplots(1, len(figures), squeeze=False)[0]
    for axis, figure in zip(axes, figures, strict=True):
        _draw(drawing, axis, figure)
    _add_legend(drawing, axes, figures[0])
    written = []
    for kind in kinds:
        path = folder / f"{name}.{kind}"
        # Without date and version, so that equal figures are equal files.
        metadata = {"Software": None} if kind == "png" else {"Date": None}
        with (
            replacing_file(path) as temporary,
            matplotlib.rc_context({"svg.hashsalt": "molf"}),
        ):
            drawing.savefig(temporary, format=kind, dpi=150, metadata=metadata)
        written.append(path)
    return written


def _add_legend(drawing: Any, axes: Sequence[Any], figure: Figure) -> None:
    """Add one legend for all axes, outside of them, so that it covers no point."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if isinstance(figure, Lines) and not figure.dotted:
        if len(found) > 1:
            axes[0].legend()
    elif isinstance(figure, Bars):
        drawing.legend(found.values(), found.keys(), loc="outside upper right", ncols=len(found))
    elif found:
        drawing.legend(found.values(), found.keys(), loc="outside right upper", fontsize="small")


def write_table(table: Table, path: Path) -> Path:
    """Write a table as CSV; return the path.

    Raises:
        OSError: It cannot be written.
    """
    with replacing_file(path) as temporary:
        temporary.write_text(csv_text(table), encoding="utf-8")
    return path


def _tables(figure: Figure) -> Iterator[tuple[str, Table]]:
    """Yield endings of names and values of a figure; of a map its cells, and its table."""
    if not isinstance(figure, Heat):
        yield "", figure.table
        return
    yield "-table", figure.table
    names = ("margin",) if figure.is_margin else figure.names
    rows: list[tuple[Cell, ...]] = [
        (layer, first, last, *(plain(value) for value in figure.values[:, row, column]))
        for row, layer in enumerate(figure.rows)
        for column, (first, last) in enumerate(zip(figure.first, figure.last, strict=True))
    ]
    yield "", Table(("layer", "first step", "last step", *names), tuple(rows))


def csv_text(table: Table) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return text.getvalue()


def _size(figure: Figure) -> tuple[float, float]:
    if isinstance(figure, Heat):
        return 8.0, min(9.0, max(2.5, 1.2 + 0.13 * len(figure.rows)))
    if isinstance(figure, Bars):
        return 6.0, 1.4 + 0.3 * len(figure.groups)
    has_legend = isinstance(figure, Points) or (isinstance(figure, Lines) and figure.dotted)
    return (7.5, 4.0) if has_legend else (6.0, 3.4)


def _draw(drawing: Any, axis: Any, figure: Figure) -> None:
    if isinstance(figure, Lines):
        _draw_lines(axis, figure)
    elif isinstance(figure, Heat):
        _draw_map(drawing, axis, figure)
    elif isinstance(figure, Bars):
        _draw_bars(axis, figure)
    elif isinstance(figure, Points):
        _draw_points(axis, figure)


def _draw_lines(axis: Any, figure: Lines) -> None:
    for one in figure.series:
        # Few values are joined over gaps: they were measured at places of their own.
        known = ~np.isnan(one.values) if figure.dotted else slice(None)
        marker = _MARKERS[one.color % len(_MARKERS)] if figure.dotted else "o"
        axis.plot(
            figure.x[known],
            one.values[known],
            color=COLORS[one.color % len(COLORS)],
            alpha=0.4 if one.faint else 1,
            linewidth=1 if one.faint else 1.8,
            label=one.name,
            drawstyle="steps-post" if figure.stepped else "default",
            marker=marker if len(figure.x) < 3 or figure.dotted else None,
        )
    if figure.log_x:
        axis.set_xscale("log")
        axis.set_title(figure.title, fontsize="medium")
    axis.set_xlabel(figure.x_label)
    axis.set_ylabel(figure.y_label)
    if figure.y_range is not None:
        low, high = figure.y_range
        axis.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))


def _draw_points(axis: Any, figure: Points) -> None:
    front = [figure.points[number] for number in figure.front]
    xs, ys = [one.x.value for one in front], [one.y.value for one in front]
    axis.plot(xs, ys, color="0.6", linestyle=":", zorder=0)
    for number, one in enumerate(figure.points):
        axis.errorbar(
            one.x.value,
            one.y.value,
            xerr=_ends(one.x),
            yerr=_ends(one.y),
            linestyle="none",
            # Markers differ as well: points may be equal, and colours repeat.
            marker=_MARKERS[number % len(_MARKERS)],
            color=COLORS[number % len(COLORS)],
            alpha=0.85,
            label=one.name,
        )
    axis.set_xlabel(figure.x_label)
    axis.set_ylabel(figure.y_label)
    axis.set_title(figure.title, fontsize="medium")


def _ends(found: Estimate) -> Any:
    if math.isnan(found.low):
        return None
    return [[max(found.value - found.low, 0)], [max(found.high - found.value, 0)]]


def _draw_map(drawing: Any, axis: Any, figure: Heat) -> None:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.patches import Patch

    extent = (figure.first[0] - 0.5, figure.last[-1] + 0.5, len(figure.rows) - 0.5, -0.5)
    if figure.is_margin:
        made = LinearSegmentedColormap.from_list("margin", [COLORS[1], "white", COLORS[0]])
        colors = made.with_extremes(bad=EMPTY)
        image = axis.imshow(
            figure.values[0],
            vmin=-1,
            vmax=1,
            cmap=colors,
            aspect="auto",
            extent=extent,
            interpolation="nearest",
        )
        drawing.colorbar(image, ax=axis, label=f"{figure.names[1]} leads / {figure.names[0]} leads")
    else:
        parts = np.array([to_rgb(COLORS[i % len(COLORS)]) for i in range(len(figure.names))])
        total = np.nansum(figure.values, axis=0)
        empty = np.isnan(figure.values[0])
        shares = np.nan_to_num(figure.values) / np.where(total > 0, total, 1)
        colored = np.einsum("erc,ek->rck", shares, parts)
        colored[empty] = to_rgb(EMPTY)
        axis.imshow(colored.clip(0, 1), aspect="auto", extent=extent, interpolation="nearest")
        keys = [Patch(color=parts[i], label=name) for i, name in enumerate(figure.names)]
        drawing.legend(handles=keys, loc="outside upper right", ncols=len(keys))
    every = -(-len(figure.rows) // _LABELS)
    axis.set_yticks(range(0, len(figure.rows), every), figure.rows[::every], fontsize=6)
    axis.set_xlabel("step")


def _draw_bars(axis: Any, figure: Bars) -> None:
    left = np.zeros(len(figure.groups))
    for number, name in enumerate(figure.parts):
        values = figure.values[:, number]
        color = COLORS[number % len(COLORS)]
        axis.barh(range(len(figure.groups)), values, left=left, color=color, label=name)
        left += values
    axis.set_yticks(range(len(figure.groups)), figure.groups)
    axis.invert_yaxis()
    axis.set_xlabel(figure.label)
