"""The tables of a report, a row per cell, method or control."""

from __future__ import annotations

from collections.abc import Sequence

from molf.measure.estimate_texts import estimate_text, number_text
from molf.shown import TextTable
from molf.study.choice import HARMS
from molf.study.report.rates import rates_text
from molf.study.report.second_phase import FORGETTING, Comparison, Control
from molf.study.report.sensitivity import Sensitivity
from molf.study.report.summary import CellSummary, MethodSummary
from molf.study.report.texts import (
    better_seeds,
    bold_if,
    compared,
    share_text,
    shares_compared,
)


def _made(header: Sequence[str], rows: Sequence[Sequence[str]]) -> TextTable:
    return TextTable("", tuple(header), tuple(map(tuple, rows)))


def differences_table(cells: Sequence[CellSummary]) -> TextTable:
    """Return the table of all methods' differences to the baseline, a row per cell."""
    names = [one.name for one in cells[0].methods] if cells else []
    rows = [
        [
            cell.name,
            cell.metric + (" (lower is better)" if cell.minimize else ""),
            cell.baseline or "",
            *(_difference(cell, one) for one in cell.methods),
        ]
        for cell in cells
    ]
    return _made(["cell", "metric", "baseline", *names], rows)


def _difference(cell: CellSummary, one: MethodSummary) -> str:
    if one.name == cell.baseline:
        return "" if one.value is None else number_text(one.value.value)
    return compared(one.comparison)


def methods_table(cell: CellSummary) -> TextTable:
    """Return the table of the methods of a cell at their chosen rates."""
    harms = harms_of(cell)
    header = [
        *("method", "rates", cell.metric, f"minus {cell.baseline or 'baseline'}", "better seeds"),
        *(harm_name(harm) for harm in harms),
        *("full's share", "trials", "minutes", "FLOP"),
    ]
    rows = [
        [
            one.name,
            one.rates or ("missing" if one.missing else "every rate failed"),
            estimate_text(one.value) + seeds_text(one),
            "" if one.name == cell.baseline else compared(one.comparison),
            better_seeds(one.comparison),
            *(estimate_text(one.harm.get(harm)) for harm in harms),
            share_text(one.full_share),
            str(one.trials),
            f"{one.seconds / 60:.1f}",
            f"{one.flops:.2g}",
        ]
        for one in cell.methods
    ]
    return _made(header, rows)


def seeds_text(one: MethodSummary) -> str:
    """Return the number of seeds in brackets where some failed or are missing; else empty."""
    if one.is_complete or not one.seeds:
        return ""
    failed = f", {len(one.failed_seeds)} failed" if one.failed_seeds else ""
    return f" ({len(one.seeds)} of {one.planned_seeds} seeds{failed})"


def sensitivity_table(cell: CellSummary) -> TextTable | None:
    """Return the table of the metric over rates; None without curves."""
    if not any(one.sensitivity for one in cell.methods):
        return None
    rows = []
    for one in cell.methods:
        if one.tried is None:
            continue
        found = one.sensitivity
        tried = " to ".join(f"{rate:.3g}" for rate in dict.fromkeys(one.tried))
        if found is None:
            numbers = ["missing" if one.missing or one.point is None else "one rate", "", ""]
        else:
            numbers = [number_text(found.area), number_text(found.worst), covered_text(found)]
        rows.append([one.name, tried, *numbers, "; ".join(one.pruned)])
    header = ["method", "tried rates", "mean", "worst", "tried part of the decade", "pruned"]
    return _made(header, rows)


def covered_text(found: Sensitivity) -> str:
    """Return the tried share of the window."""
    return "all" if found.is_whole else f"{found.covered:.0%}"


def controls_table(cell: CellSummary) -> TextTable:
    """Return the table of methods against their controls, at own and at equal rates."""
    harms = harms_of(cell)
    rows = [
        line
        for name, controls in cell.controls.items()
        for control in controls
        for line in _control_rows(name, control, harms)
    ]
    header = [
        *("method", "control", "at", "rates", "full's share (method / control)"),
        *(f"{cell.metric}: difference", "better seeds"),
        *(f"{harm_name(harm)}: difference" for harm in harms),
    ]
    return _made(header, rows)


def _control_rows(name: str, control: Control, harms: Sequence[str]) -> list[list[str]]:
    own, equal = control.own, control.equal
    if own is not None and own.point == own.other_point:
        return [_control_row(name, control.name, "own rates, which are equal", own, harms)]
    return [
        _control_row(name, control.name, "own rates", own, harms),
        _control_row(name, control.name, "equal rates", equal, harms),
    ]


def _control_row(
    name: str, control: str, at: str, found: Comparison | None, harms: Sequence[str]
) -> list[str]:
    if found is None:
        return [name, control, at, "missing", *[""] * (3 + len(harms))]
    rates = [rates_text(found.point)]
    if found.other_point != found.point:
        rates.append(rates_text(found.other_point))
    return [
        *(name, control, at, " / ".join(rates), shares_compared(found)),
        *(compared(found), better_seeds(found)),
        *(
            bold_if(found.harm[harm], is_complete=found.is_complete) if harm in found.harm else ""
            for harm in harms
        ),
    ]


def harms_of(cell: CellSummary) -> list[str]:
    """Return the measures of harm that a method of a cell has."""
    return [harm for harm in HARMS if any(harm in one.harm for one in cell.methods)]


def harm_name(harm: str) -> str:
    """Return the name of a measure of harm in tables."""
    return "forgetting (change)" if harm == FORGETTING else harm
