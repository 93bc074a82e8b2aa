"""Figures of a training: loss, rates, gradient norm, speed, memory, updates lost by rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from molf.report.figures import Figure, Section, Series, lines, smoothed
from molf.report.run_data import Floats, RunData
from molf.shown import counted

_SPANS = 20  # the smoothed loss averages about a twentieth of the lines ...
_LONG = 60  # ... of a log with so many


def training_section(data: RunData) -> Section | None:
    """Return the figures of the log; None without a log."""
    figures = tuple(_figures(data))
    return Section("training", "Training", figures) if figures else None


def _figures(data: RunData) -> Iterator[Figure]:
    log = data.log
    x = log.get("step")
    if x is None or not len(x):
        return
    if (loss := _known(data, "loss")) is not None:
        is_long = len(x) >= _LONG
        series = [Series("loss", loss, 0, faint=is_long)]
        if is_long:
            series.append(Series("smoothed", smoothed(loss, len(x) // _SPANS), 0))
        yield lines(
            "loss",
            "Loss",
            _change("Loss (nats per token)", loss),
            x,
            series,
            y_label="nats per token",
        )
    if (found := data.evaluations.get("eval_loss")) is not None and not np.isnan(found).all():
        lowest = int(data.evaluations["step"][np.nanargmin(found)])
        yield lines(
            "eval_loss",
            "Loss on the validation part",
            f"{_change('Loss on the validation part (nats per token)', found)} The lowest is that "
            f"of step {lowest}.",
            data.evaluations["step"],
            [Series("validation", found, 1)],
            y_label="nats per token",
        )
    rates = [name for name in log if name.endswith("learning_rate")]
    rates = [name for name in rates if _known(data, name) is not None]
    if rates:
        highest = ", ".join(f"{name} at most {np.nanmax(log[name]):.3g}" for name in rates)
        series = [Series(name, log[name], number) for number, name in enumerate(rates)]
        yield lines("rates", "Learning rates", f"{highest}.", x, series, y_label="rate")
    for name, title, unit in (
        ("grad_norm", "Gradient norm", "norm before clipping"),
        ("tokens_per_second", "Speed", "tokens per second"),
        ("lost_updates", "Updates lost by rounding", "share of elements"),
        ("skipped_steps", "Skipped steps", "steps so far"),
    ):
        found = _known(data, name)
        if found is None or (name == "lost_updates" and not np.nanmax(found) > 0):
            continue
        text = _change(f"{title} ({unit})", found)
        yield lines(name, title, text, x, [Series(name, found)], y_label=unit)
    if (peak := _known(data, "peak_memory_bytes")) is not None:
        series = [Series("at most up to the step", peak / 2**30, 0)]
        if (now := _known(data, "memory_bytes")) is not None:
            series.append(Series("at the step", now / 2**30, 1))
        text = _change("Memory at most up to the step (GiB)", peak / 2**30)
        yield lines("memory", "Memory", text, x, series, y_label="GiB")


def _known(data: RunData, name: str) -> Floats | None:
    found = data.log.get(name)
    return None if found is None or np.isnan(found).all() else found


def _change(name: str, values: Floats) -> str:
    known = values[~np.isnan(values)]
    gaps = len(values) - len(known)
    missing = f" {counted(gaps, 'line')} of the log without a value." if gaps else ""
    low, high = float(known.min()), float(known.max())
    if math.isclose(low, high):
        return f"{name}: {low:.4g} throughout.{missing}"
    return (
        f"{name}: from {known[0]:.4g} to {known[-1]:.4g}; lowest {low:.4g}, median "
        f"{np.median(known):.4g}, highest {high:.4g}.{missing}"
    )
