"""A comparison as tables for a terminal, for Markdown and for a page, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from molf.compare.summary import (
    BEST,
    CLOSE,
    FORGETTING,
    UNKNOWN,
    CellSummary,
    MethodValue,
    MetricSummary,
)
from molf.measure.estimate_texts import table as markdown_table
from molf.measure.estimates import Estimate
from molf.measure.meanings import meanings
from molf.report.figures import Cell, Table, plain

MARGIN = "MoLF - max(fft, LoRA)"
MARKS = {BEST: "*", CLOSE: "~", UNKNOWN: "?"}
LABELS = {
    "trained_parameters": "trained parameters",
    "training_seconds": "training time, s",
    "peak_memory_bytes": "peak memory, MiB",
    FORGETTING: "forgetting",
}
_MIB = 2**20


@dataclass(frozen=True)
class TextCell:
    """A value as text.

    Attributes:
        value: The value; empty for none.
        interval: Its interval; empty where it is unknown.
        place: As in `MethodValue`.
    """

    value: str
    interval: str = ""
    place: str = ""

    @property
    def line(self) -> str:
        """Value, interval and mark."""
        return " ".join(filter(None, (self.value, self.interval, MARKS.get(self.place, ""))))


@dataclass(frozen=True)
class TextTable:
    """A table of a comparison.

    Attributes:
        title: Its heading.
        columns: Names of the columns.
        rows: Name and cells of each row.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[TextCell, ...]], ...]


def values_table(found: CellSummary) -> TextTable:
    """Return the means of a cell with their intervals, and MoLF's margins."""
    methods = list(found.cell.methods)
    margins = _margins_of(found)
    rows = []
    for metric in found.metrics:
        cells = [_value(metric, metric.methods.get(method)) for method in methods]
        cells += [_difference(metric, metric.margins.get(method)) for method in margins]
        rows.append((label_of(metric), tuple(cells)))
    heads = [f"{method} (n {len(runs)})" for method, runs in found.cell.methods.items()]
    names = [MARGIN if len(margins) == 1 else f"{MARGIN}, {method}" for method in margins]
    return TextTable(found.cell.name, ("metric", *heads, *names), tuple(rows))


def differences_table(found: CellSummary) -> TextTable | None:
    """Return the paired differences to the best method of each metric; None for one method."""
    methods = list(found.cell.methods)
    rows = []
    for metric in found.metrics:
        if not metric.is_ranked or len(metric.methods) < 2:
            continue
        cells = []
        for method in methods:
            one = metric.methods.get(method)
            if one is not None and one.place == BEST:
                cells.append(TextCell("best"))
            elif one is not None and one.behind is None:
                cells.append(TextCell("no common seed"))
            else:
                cells.append(_difference(metric, None if one is None else one.behind))
        rows.append((label_of(metric), tuple(cells)))
    if not rows:
        return None
    title = f"{found.cell.name}: difference to the best"
    return TextTable(title, ("metric", *methods), tuple(rows))


def _margins_of(found: CellSummary) -> list[str]:
    return list(dict.fromkeys(name for metric in found.metrics for name in metric.margins))


def label_of(metric: MetricSummary) -> str:
    """Return the name of a metric; marked if lower values are better."""
    name = LABELS.get(metric.name, metric.name)
    return f"{name} (lower)" if metric.minimize else name


def _value(metric: MetricSummary, one: MethodValue | None) -> TextCell:
    if one is None:
        return TextCell("-")
    write, found = _writer(metric.name), one.value
    return TextCell(write(found.value), _interval(found, write), one.place)


def _difference(metric: MetricSummary, found: Estimate | None) -> TextCell:
    if found is None:
        return TextCell("")
    write = _writer(metric.name, sign="+")
    return TextCell(write(found.value), _interval(found, write))


def _interval(found: Estimate, write: Callable[[float], str]) -> str:
    if math.isnan(found.low) or (found.low == found.high and abs(found.value) > 1):
        return ""  # unknown, or a number that is the same for all seeds
    return f"[{write(found.low)}, {write(found.high)}]"


def _writer(name: str, sign: str = "") -> Callable[[float], str]:
    scale, form = {
        "trained_parameters": (1, ",.0f"),
        "training_seconds": (1, ",.1f"),
        "peak_memory_bytes": (_MIB, ",.0f"),
    }.get(name, (1, ".3f"))
    return lambda value: f"{value / scale:{sign}{form}}"


def legend(summaries: Sequence[CellSummary], best: str = MARKS[BEST]) -> list[str]:
    """Return the lines under the tables: marks, intervals, margins.

    Args:
        summaries: The comparison.
        best: The mark of the best.
    """
    metrics = [metric for summary in summaries for metric in summary.metrics]
    found = [one for metric in metrics for one in metric.methods.values()]
    units = {one.value.units for one in found if not math.isnan(one.value.low)}
    lines = []
    if any(one.place for one in found):
        lines.append(
            f"{best}: best mean; {MARKS[CLOSE]}: not distinguishable from it, as the interval of "
            "the paired difference includes 0 (95% each, without a correction for their number)"
        )
    if any(one.place == UNKNOWN for one in found):
        lines.append(f"{MARKS[UNKNOWN]}: no interval of the difference (one seed, or none common)")
    texts = {
        "questions and seeds": "over seeds and questions for metrics of single questions",
        "seeds": "over seeds for others",
        "questions": "over questions alone where there is one seed",
    }
    if known := [text for unit, text in texts.items() if unit in units]:
        lines.append(f"intervals: 95%, {'; '.join(known)}; n: seeds")
    if any(metric.minimize for metric in metrics):
        lines.append("(lower): lower is better")
    if any(metric.name == FORGETTING for metric in metrics):
        lines.append(f"{FORGETTING}: forgetting_loss after the training minus before")
    if any(metric.margins for metric in metrics):
        lines.append(
            f"{MARGIN}: minus the better of both by its mean (min where lower is better), which is "
            "chosen again in each resample"
        )
    return lines


def meaning_lines(summaries: Sequence[CellSummary]) -> list[tuple[str, str]]:
    """Return names and meaning of the metrics."""
    return meanings(metric.name for summary in summaries for metric in summary.metrics)


def markdown(summaries: Sequence[CellSummary], notices: Sequence[str]) -> str:
    """Return the comparison in Markdown."""
    parts = []
    for found in summaries:
        for one in filter(None, (values_table(found), differences_table(found))):
            rows = [[name, *(_marked(cell) for cell in cells)] for name, cells in one.rows]
            parts.append(f"## {one.title}")
            parts.append("\n".join(markdown_table(one.columns, rows)))
    lines = [*legend(summaries, "bold"), *(f"{x}: {text}" for x, text in meaning_lines(summaries))]
    parts.append("\n".join(f"- {line}" for line in (*lines, *notices)))
    return "\n\n".join(parts) + "\n"


def _marked(cell: TextCell) -> str:
    if cell.place == BEST:
        return f"**{' '.join(filter(None, (cell.value, cell.interval)))}**"
    return cell.line


def csv_table(summaries: Sequence[CellSummary]) -> Table:
    """Return all values, a row per task, model, metric and method; memory in bytes."""
    columns = (
        *("task", "model", "metric", "better", "method", "seeds", "value", "low", "high"),
        *("interval_over", "place", "minus_best", "minus_best_low", "minus_best_high"),
        *("minus_max_fft_lora", "minus_max_fft_lora_low", "minus_max_fft_lora_high"),
    )
    rows: list[tuple[Cell, ...]] = []
    for summary in summaries:
        for metric in summary.metrics:
            better = ("lower" if metric.minimize else "higher") if metric.is_ranked else ""
            for method, one in metric.methods.items():
                rows.append(
                    (
                        *(summary.cell.task, summary.cell.model, metric.name, better, method),
                        ",".join(map(str, one.seeds)),
                        *_numbers(one.value),
                        *(one.value.units, one.place),
                        *_numbers(one.behind),
                        *_numbers(metric.margins.get(method)),
                    )
                )
    return Table(columns, tuple(rows))


def _numbers(found: Estimate | None) -> tuple[Cell, Cell, Cell]:
    if found is None:
        return None, None, None
    return plain(found.value), plain(found.low), plain(found.high)
