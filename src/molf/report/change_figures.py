"""Figures of the change W - W0 of the linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from molf.report.figures import Cell, Floats, Lines, Section, Series, Table, plain
from molf.report.run_data import RunData
from molf.shown import counted


def change_section(data: RunData) -> Section | None:
    """Return the figures of the change; None without `spectra.json`."""
    if not data.spectra:
        return None
    layers: list[dict[str, Any]] = data.spectra["layers"]
    missing = data.spectra.get("not_measured") or []
    text = (
        f"Measured: {len(layers)} of {counted(len(layers) + len(missing), 'layer')}; then the "
        "time was up.",
    )
    if not layers:
        return Section("change", "The change", (), text if missing else ())
    directions = data.spectra.get("directions")
    relative = [_relative(one) for one in layers]
    largest = max(range(len(layers)), key=lambda number: relative[number])
    intruders = [one["intruders"] for one in layers]
    ranks = [one["effective_rank"] for one in layers]
    table = _table(layers)
    return Section(
        "change",
        "The change",
        (
            _figure(
                "change-norm",
                "Norm of the change",
                f"Norm of W - W0 relative to W0: median {median(relative):.3g}, largest "
                f"{relative[largest]:.3g} in {layers[largest]['name']}.",
                table,
                (Series("relative norm", np.array(relative)),),
                "share of the norm of W0",
            ),
            _figure(
                "change-rank",
                "Directions of the change",
                f"Effective rank of the leading {directions} directions: median "
                f"{median(ranks):.3g}. A gap: {directions} directions hold less than 90%.",
                table,
                (
                    Series("directions of 90%", _numbers(layers, "directions_90"), 1),
                    Series("effective rank", np.array(ranks, dtype=np.float64), 2),
                ),
                "directions",
            ),
            _figure(
                "intruders",
                "Intruder dimensions",
                f"{counted(sum(intruders), 'intruder')} in "
                f"{sum(one > 0 for one in intruders)} of {counted(len(layers), 'layer')}: "
                "leading singular vectors of W that are like none of W0.",
                table,
                (Series("intruders", np.array(intruders, dtype=np.float64), 3),),
                "of the 10 leading directions",
                y_range=(0.0, 10.0),
            ),
        ),
        text if missing else (),
    )


def _figure(
    name: str,
    title: str,
    text: str,
    table: Table,
    series: tuple[Series, ...],
    label: str,
    y_range: tuple[float, float] | None = None,
) -> Lines:
    x = np.arange(1, len(table.rows) + 1, dtype=np.float64)
    return Lines(
        name,
        title,
        f"{text} Layers in the model's order.",
        table,
        x,
        "layer",
        label,
        series,
        y_range,
        has_own_table=True,
    )


def _table(layers: Sequence[dict[str, Any]]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            str(one["name"]),
            plain(_relative(one)),
            one.get("directions_90"),
            plain(one.get("held")),
            plain(one["effective_rank"]),
            one["intruders"],
        )
        for one in layers
    ]
    columns = ("layer", "norm / norm of W0", "directions of 90%", "held by all", "effective rank")
    return Table((*columns, "intruders"), tuple(rows))


def _relative(layer: dict[str, Any]) -> float:
    return float(layer["change_norm"]) / (float(layer["base_norm"]) or 1.0)


def _numbers(layers: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array(
        [np.nan if one.get(name) is None else float(one[name]) for one in layers], dtype=np.float64
    )
