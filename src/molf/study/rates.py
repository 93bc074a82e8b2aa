"""The rates of a study: points of a grid, or ranges for a sampler."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from molf.study.definition import (
    GRID,
    LEARNING_RATE,
    LORA_RATE,
    RANDOM,
    RATES,
    RATIO,
    Cell,
    Choose,
    Method,
    Point,
    Range,
    Rates,
    Study,
    point_text,
)
from molf.study.values import StudyFileError, TooManyError, mapping, number, reject_unknown

_MOST_POINTS = 10_000  # per method; a grid of more is counted, not made


def read_rates(content: Any, choose: Choose, where: str) -> Rates:
    """Return the rates of a method.

    Args:
        content: Lists by name (their product is tried), a list of points, or, with the samplers
            random and tpe, `{low, high}` by name.
        choose: The phase that tries them.
        where: Their place in the file, for messages.

    Raises:
        StudyFileError: A name is unknown, or a value is wrong.
    """
    if choose.sampler == GRID:
        return Rates(points=_grid(content, choose, where))
    ranges = {}
    for name, entry in _by_name(content, where).items():
        if not isinstance(entry, Mapping):
            raise StudyFileError(
                f"{where}, {name}: sampler={choose.sampler} draws from a range, such as "
                f"{{low: 1e-4, high: 1e-2}}, not {entry!r:.80}."
            )
        reject_unknown(entry, ("low", "high"), f"{where}, {name}")
        low, high = (number(entry.get(end), f"{where}, {name}, {end}") for end in ("low", "high"))
        if low > high:
            raise StudyFileError(f"{where}, {name}: low={low:g} is above high={high:g}.")
        ranges[name] = Range(low, high)
    return Rates(ranges=ranges)


def _by_name(content: Any, where: str) -> Mapping[str, Any]:
    rates = mapping(content, where)
    reject_unknown(rates, RATES, where)
    _check_names(rates, where)
    return rates


def _check_names(rates: Mapping[str, Any], where: str) -> None:
    if not rates:
        raise StudyFileError(f"{where} are missing: give {', '.join(RATES)}.")
    if RATIO in rates and (LEARNING_RATE not in rates or LORA_RATE in rates):
        raise StudyFileError(
            f"{where}: {RATIO} is a multiple of {LEARNING_RATE}, and stands for {LORA_RATE}. Give "
            f"it with {LEARNING_RATE} and without {LORA_RATE}."
        )


def _grid(content: Any, choose: Choose, where: str) -> tuple[Point, ...]:
    if isinstance(content, list):
        points = []
        for entry in content:
            rates = _by_name(entry, where)
            points.append({name: number(rate, f"{where}, {name}") for name, rate in rates.items()})
    else:
        lists = {}
        for name, entry in _by_name(content, where).items():
            if isinstance(entry, Mapping):
                raise StudyFileError(f"{where}, {name}: a grid tries a list of rates, not a range.")
            values = entry if isinstance(entry, list) else [entry]
            lists[name] = [number(value, f"{where}, {name}") for value in values]
        count = math.prod(map(len, lists.values()))
        if count > _MOST_POINTS:
            raise TooManyError(
                count * len(choose.seeds),
                f"{where}: {count:,} points per method, cell and seed",
                f"At most {_MOST_POINTS:,} are allowed. Use the samplers random and tpe with "
                "choose.trials.",
            )
        points = [
            dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())
        ]
    if not points:
        raise StudyFileError(f"{where} are missing.")
    seen = set()
    for point in points:
        text = point_text(point)
        if text in seen:
            raise StudyFileError(f"{where}: a point is given twice: {text}.")
        seen.add(text)
    return tuple(points)


def check_equal_numbers(study: Study) -> None:
    """Check that all methods have the same number of rate trials in each cell.

    Raises:
        StudyFileError: They differ.
    """
    for cell in study.cells:
        counts = {method.name: study.points(cell, method) for method in study.methods}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            fewest, most = min(counts.values()), max(counts.values())
            raise StudyFileError(
                f"cells, {cell.name}: methods have different numbers of rate trials ({listed}). "
                f"With {most - fewest} more, one method would be tuned better. Give each the same."
            )


def drawn_points(study: Study, cell: Cell, method: Method) -> tuple[Point, ...] | None:
    """Return the points that are known before any trial; None if the sampler is tpe.

    Those of the sampler random are log-uniform and a function of the names and of their number.
    """
    rates = study.rates(cell, method)
    if study.choose.sampler == GRID:
        return rates.points
    if study.choose.sampler != RANDOM:
        return None
    source = method.control_of or method.name
    points = []
    for index in range(study.choose.trials or 0):
        rng = np.random.default_rng(number_of(study.name, cell.name, source, str(index)))
        points.append(
            {
                name: float(f"{math.exp(rng.uniform(math.log(r.low), math.log(r.high))):.4g}")
                for name, r in rates.ranges.items()
            }
        )
    return tuple(points)


def number_of(*parts: str) -> int:
    """Return an integer in [0, 2**31) that is a function of texts, for seeds of samplers."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:4], "big") >> 1


def limits(rates: Rates) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest value of each rate."""
    if rates.ranges:
        return {name: (r.low, r.high) for name, r in rates.ranges.items()}
    known: dict[str, list[float]] = {}
    for point in rates.points:
        for name, value in point.items():
            known.setdefault(name, []).append(value)
    return {name: (min(values), max(values)) for name, values in known.items()}
