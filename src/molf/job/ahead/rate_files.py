"""Files of a range test: `rates.json`, `rates.csv` and `rates.png`."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from molf.colors import COLORS
from molf.disk.files import replacing_file, write_json, write_text
from molf.job.ahead.evidence import RangeTest, SweptRate
from molf.job.ahead.short import ShortTraining
from molf.job.record.directory import RunDirectory
from molf.job.record.environment import environment
from molf.job.record.ownership import RATES, RATES_FIGURE, RATES_TABLE

_COLUMNS = ("sweep", "step", "rate", "loss", "smoothed", "slope_per_decade", "won")


def write_start(short: ShortTraining, ends: tuple[float, float]) -> dict[str, Any]:
    """Write `rates.json` without sweeps, and return its content; `ends` are the end rates."""
    opening = short.opening
    record = {
        "from": ends[0],
        "to": ends[1],
        "options": opening.settings.as_options(),
        "task": short.task.description(),
        "files": short.files,
        "environment": environment(opening.arguments.device, short.started),
        "sweeps": [],
    }
    write_json(short.directory / RATES, record)
    return record


def write_files(directory: RunDirectory, result: RangeTest, record: dict[str, Any]) -> None:
    """Write the three files.

    Args:
        directory: The directory.
        result: The range test.
        record: The result of `write_start`.

    Raises:
        OSError: A file cannot be written.
    """
    sweeps = [_record(sweep) for sweep in result.sweeps]
    write_json(directory / RATES, {**record, "seconds": round(result.seconds, 3), "sweeps": sweeps})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for sweep in result.sweeps:
        writer.writerows(_rows(sweep))
    write_text(directory / RATES_TABLE, text.getvalue())
    _draw(result, directory)


def _record(sweep: SweptRate) -> dict[str, Any]:
    return {
        "option": sweep.option,
        "held": sweep.held,
        "passes": round(sweep.passes, 3),
        "won_at_suggestion": sweep.won_at_suggestion,
        **sweep.evidence.record(),
        "doubts": sweep.doubts,
        "rates": sweep.rates.tolist(),
        "losses": [loss if math.isfinite(loss) else None for loss in sweep.losses.tolist()],
    }


def _rows(sweep: SweptRate) -> Iterator[list[Any]]:
    found = sweep.evidence
    columns = (sweep.rates, sweep.losses, found.smoothed, found.slopes)
    won = [*sweep.won, *[math.nan] * (len(sweep.rates) - len(sweep.won))]
    for step, numbers in enumerate(zip(*columns, won, strict=True), 1):
        yield [
            sweep.option,
            step,
            *(f"{x:.6g}" if math.isfinite(x) else "" for x in numbers),
        ]


def _draw(result: RangeTest, directory: RunDirectory) -> None:
    """Draw the loss over the rate, one field per sweep."""
    from matplotlib.figure import Figure

    count = len(result.sweeps)
    drawing = Figure(figsize=(1.5 + 5 * count, 3.8), layout="constrained")
    for axis, sweep in zip(
        drawing.subplots(1, count, squeeze=False)[0], result.sweeps, strict=True
    ):
        _draw_sweep(axis, sweep, result.method)
    with replacing_file(directory / RATES_FIGURE) as temporary:
        # Without the version of matplotlib, so that equal figures are equal files.
        drawing.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _draw_sweep(axis: Any, sweep: SweptRate, method: str) -> None:
    found = sweep.evidence
    axis.plot(sweep.rates, sweep.losses, ".", color="0.6", markersize=4, label="loss of a step")
    axis.plot(sweep.rates, found.smoothed, color=COLORS[1], label="smoothed")
    for rate, color, style, name in (
        (found.suggestion, COLORS[2], "-", "suggestion"),
        (found.lowest_at, COLORS[4], ":", "lowest loss"),
        (found.diverged_at, COLORS[0], "--", "diverged"),
    ):
        if rate is not None:
            axis.axvline(rate, color=color, linestyle=style, label=f"{name}: {rate:.2g}")
    axis.set_xscale("log")
    # The last losses may be many times the others.
    known = sweep.losses[np.isfinite(sweep.losses)]
    top = max(found.start, float(np.quantile(known, 0.9)))
    room = max(top - found.lowest, 1e-9)
    axis.set_ylim(min(found.lowest, float(known.min())) - 0.1 * room, top + 0.5 * room)
    axis.set_xlabel(sweep.option)
    axis.set_ylabel("training loss")
    held = "" if sweep.held is None else f", {sweep.held} held at 0"
    axis.set_title(f"{method}{held}", fontsize="medium")
    axis.legend(fontsize="small")
