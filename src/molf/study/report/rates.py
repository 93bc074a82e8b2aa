"""Rates in stored rows: the curve over a method's main rate, edges of its grid, and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from molf.study.definition import LEARNING_RATE, LORA_RATE, RATES, RATIO, Point, rate_options

_SHORT = {LEARNING_RATE: "lr", LORA_RATE: "lora_lr", RATIO: "ratio"}


def rates_of(row: Mapping[str, Any]) -> Point:
    """Return the rates of a trial: of dense weights and of LoRA factors, where it has them."""
    found = {name: float(row[name]) for name in (LEARNING_RATE, LORA_RATE) if name in row}
    if LORA_RATE not in found and RATIO in row:
        return rate_options({name: row[name] for name in (LEARNING_RATE, RATIO)})
    return found


def tried_names(outline: Mapping[str, Any], cell: str, method: str) -> tuple[str, ...]:
    """Return the names of the rates that a study file gives for a method; the first is its main.

    Args:
        outline: The stored outline of the study.
        cell: A cell.
        method: A method; a control without rates of its own has those of its method.
    """
    entry = outline["methods"][method]
    rates = outline["cells"][cell]["rates"].get(method, entry["rates"])
    of = entry.get("control_of") or entry.get("share_of")
    if not rates and of:
        return tried_names(outline, cell, of)
    given = rates if isinstance(rates, Mapping) else {name for point in rates for name in point}
    return tuple(name for name in RATES if name in given)


def value_of(point: Mapping[str, float], name: str) -> float | None:
    """Return a rate, or the ratio of the two; None without it."""
    if name == RATIO and {LEARNING_RATE, LORA_RATE} <= point.keys():
        return float(f"{point[LORA_RATE] / point[LEARNING_RATE]:.4g}")
    return point.get(name)


def curve_points(
    points: Mapping[int, Point], chosen: int, names: Sequence[str]
) -> dict[float, int]:
    """Return the points that differ from the chosen one in the main rate alone, by that rate.

    Of a list of pairs of rates, in which no two have the same second rate, the points with the
    chosen ratio are taken.

    Args:
        points: The rates by number of the point.
        chosen: Number of the chosen point.
        names: The rates that the study tries; the first is the main one.
    """
    main, *others = names
    found = _alike(points, chosen, main, others)
    if len(found) < 2 and LORA_RATE in others:
        found = _alike(points, chosen, main, [RATIO])
    return found


def _alike(
    points: Mapping[int, Point], chosen: int, main: str, others: Sequence[str]
) -> dict[float, int]:
    fixed = {name: value_of(points[chosen], name) for name in others}
    return {
        point[main]: index
        for index, point in sorted(points.items())
        if main in point and all(value_of(point, name) == fixed[name] for name in others)
    }


def edges(points: Mapping[int, Point], chosen: int, names: Sequence[str]) -> dict[str, str]:
    """Return `lowest tried` or `highest tried` by the rates of a choice to which this applies.

    A rate with one tried value has no edge.
    """
    found = {}
    for name in names:
        values = sorted({v for point in points.values() if (v := value_of(point, name))})
        if len(values) < 2:
            continue
        value = value_of(points[chosen], name)
        if value in (values[0], values[-1]):
            found[name] = "lowest tried" if value == values[0] else "highest tried"
    return found


def rates_text(point: Mapping[str, float], marks: Mapping[str, str] | None = None) -> str:
    """Return rates as text, such as `lr 0.001 (lowest tried), lora_lr 0.002`.

    Args:
        point: The rates.
        marks: Remarks by name of a rate; one of the ratio is added at the end.
    """
    marks = marks or {}
    parts = [
        f"{_SHORT[name]} {point[name]:.6g}" + (f" ({marks[name]})" if name in marks else "")
        for name in (LEARNING_RATE, LORA_RATE)
        if name in point
    ]
    if RATIO in marks:
        parts.append(f"ratio {value_of(point, RATIO):g} ({marks[RATIO]})")
    return ", ".join(parts)
