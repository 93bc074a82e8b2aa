"""Sentences about learning rates, and how much they matter."""

from __future__ import annotations

from collections import Counter
from statistics import median

from molf.shown import counted
from molf.study.definition import CHOOSE, LEARNING_RATE, LORA_RATE
from molf.study.report.rates import rates_of
from molf.study.report.records import is_complete
from results.stored import NO_ROWS, Study


def spread(study: Study) -> str:
    """Return the loss by a wrong rate, and the size of differences between methods."""
    rows = [one for cell in study.cells for one in cell.methods if one.name in study.own]
    by_rate = [
        abs(one.chosen_value - one.sensitivity.worst)
        for one in rows
        if one.sensitivity is not None and one.sensitivity.is_whole
    ]
    by_method = [
        abs(one.comparison.estimate.value)
        for one in rows
        if one.comparison is not None and one.comparison.is_complete
    ]
    if not by_rate or not by_method:
        return NO_ROWS
    rate, method = median(by_rate), median(by_method)
    first, second = ("rate", "method") if rate > method else ("method", "rate")
    return (
        f"the worst rate within half a decade of the chosen one costs {rate:.3f} of the metric "
        f"(median over {len(by_rate)} methods and cells), and a method differs from the baseline "
        f"by {method:.3f} (median over {len(by_method)}): here the {first} matters more than the "
        f"{second}"
    )


def harm_by_rate(study: Study, metric: str) -> str:
    """Return in how many methods and cells the lowest rate does less harm than the highest."""
    ends: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in study.rows:
        point = rates_of(row)
        if row["phase"] == CHOOSE and is_complete(row) and f"after/{metric}" in row and point:
            rate = point.get(LEARNING_RATE, point.get(LORA_RATE, 0.0))
            ends.setdefault((row["cell"], row["method"]), []).append((rate, row[f"after/{metric}"]))
    whole = [sorted(found) for found in ends.values() if len({rate for rate, _ in found}) > 1]
    if not whole:
        return NO_ROWS
    less = sum(found[0][1] < found[-1][1] for found in whole)
    return (
        f"in {less} of {len(whole)} pairs of method and cell {metric} is lower at the lowest tried "
        "rate than at the highest"
    )


def settings(study: Study, method: str) -> str:
    """Return the chosen rates of a method, lowest first, and the number of cells of each."""
    found = [one for _, one in study.of(method) if one.point]
    found.sort(key=lambda one: sorted((one.point or {}).items()))
    counts = Counter(one.rates for one in found)
    return "; ".join(f"{rates}: {counted(n, 'cell')}" for rates, n in counts.items()) or NO_ROWS


def ranges(study: Study) -> str:
    """Return the lowest and highest tried main rate of each method."""
    tried: dict[tuple[float, ...], list[str]] = {}
    for name in (one.name for one in (study.cells[0].methods if study.cells else ())):
        ends = [rate for _, one in study.of(name) for rate in one.tried or ()]
        if ends:
            tried.setdefault((min(ends), max(ends)), []).append(f"`{name}`")
    found = [f"{low:g} to {high:g} ({', '.join(names)})" for (low, high), names in tried.items()]
    return "; ".join(found) or NO_ROWS
