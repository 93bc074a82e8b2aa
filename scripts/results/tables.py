"""Tables of a page of results."""

from __future__ import annotations

from collections.abc import Callable

from molf.measure.estimate_texts import estimate_text, markdown_of, number_text, table
from molf.study.report.assigned import assigned_table
from molf.study.report.second_phase import Comparison
from molf.study.report.summary import MethodSummary
from molf.study.report.tables import (
    controls_table,
    covered_text,
    differences_table,
    harm_name,
    harms_of,
    seeds_text,
)
from molf.study.report.texts import better_seeds, bold_if, compared
from results.stored import NO_ROWS, Study


def chosen(study: Study) -> str:
    """Return the table of chosen rates."""
    return _by_method(study, lambda one: one.rates or _lacking(one))


def differences(study: Study) -> str:
    """Return the table of differences to the baseline."""
    return "\n".join(markdown_of(differences_table(study.cells))) if study.cells else NO_ROWS


def controls(study: Study) -> str:
    """Return the tables of methods against controls."""
    parts = [
        "\n".join([f"`{cell.name}`, {cell.metric}:", "", *markdown_of(controls_table(cell))])
        for cell in study.cells
        if cell.controls
    ]
    return "\n\n".join(parts) or NO_ROWS


def methods(study: Study) -> str:
    """Return a table for each cell with a row for each method, for studies of few cells."""
    parts = []
    for cell in study.cells:
        rows = [
            [
                one.name,
                one.rates or _lacking(one),
                estimate_text(one.value) if one.name == cell.baseline else compared(one.comparison),
                _share_text(one),
                estimate_text(one.harm.get("forgetting_loss")) + seeds_text(one),
            ]
            for one in cell.methods
        ]
        metric = f"{cell.metric}, minus {cell.baseline}"
        header = ["method", "chosen rates", metric, "in full", harm_name("forgetting_loss")]
        parts.append("\n".join([f"`{cell.name}`:", "", *table(header, rows)]))
    return "\n\n".join(parts) or NO_ROWS


def sensitivity(study: Study) -> str:
    """Return the table of the mean and the worst value over the decade around the chosen rate."""

    def text(one: MethodSummary) -> str:
        found = one.sensitivity
        if found is None:
            return _lacking(one)
        covered = "" if found.is_whole else f", {covered_text(found)} tried"
        return f"{number_text(found.area)} ({number_text(found.worst)}{covered})"

    return _by_method(study, text)


def harm(study: Study, metric: str) -> str:
    """Return the table of a measure of harm."""
    return _by_method(study, lambda one: estimate_text(one.harm.get(metric)) + seeds_text(one))


def shares(study: Study) -> str:
    """Return the table of the shares of updates that `full` took."""
    return _by_method(study, _share_text)


def assigned(study: Study) -> str:
    """Return the table of the rows of method hybrid."""
    return "\n".join(markdown_of(assigned_table(study.cells))) if study.cells else NO_ROWS


def against(study: Study, other: str, *methods: str) -> str:
    """Return the table of methods minus another one, at the rates chosen for each."""
    rows = []
    for cell, beside in study.of(other):
        for name in methods:
            one = cell.method(name)
            if one is None:
                raise KeyError(name)
            found = cell.compare(one, beside)
            rows.append([cell.name, name, compared(found), better_seeds(found)])
            rows[-1] += [_harm_text(found, harm) for harm in harms_of(cell)]
    if not rows:
        return NO_ROWS
    names = [harm_name(harm) for harm in harms_of(study.cells[0])]
    header = ["cell", "method", f"metric, minus {other}", "better seeds", *names]
    return "\n".join(table(header, rows))


def _harm_text(found: Comparison | None, harm: str) -> str:
    if found is None or harm not in found.harm:
        return ""
    return bold_if(found.harm[harm], is_complete=found.is_complete)


def _share_text(one: MethodSummary) -> str:
    return "" if one.full_share is None else f"{one.full_share:.0%}"


def _by_method(study: Study, text: Callable[[MethodSummary], str]) -> str:
    if not study.cells:
        return NO_ROWS
    names = [one.name for one in study.cells[0].methods]
    rows = ([cell.name, *(text(one) for one in cell.methods)] for cell in study.cells)
    return "\n".join(table(["cell", *names], rows))


def _lacking(one: MethodSummary) -> str:
    return "missing" if one.missing else "none: every rate failed" if one.point is None else ""
