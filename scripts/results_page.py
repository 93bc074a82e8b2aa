"""Write the pages of results from their templates and the stored studies.

No figure is typed by hand: a page NAME.md is made from NAME.template.md.

`docs/studies/NAME` holds the CSV files that `molf study report NAME --to docs/studies/NAME` wrote.
In a template, `{{WORDS}}` is replaced:

    differences STUDY         table of differences to the baseline, by cell and method
    controls STUDY            table of methods against controls with their share of full updates
    rates STUDY               table of the mean and the worst value over the tried rates
    harm STUDY METRIC         table of forgetting_loss, kl_neutral or kl_task at the chosen rates
    shares STUDY              table of the share of updates that the expert full took
    tally STUDY METHOD        cells in which a method is better or worse than the baseline
    tally STUDY METHOD OTHER  the same against a share-matched control
    value STUDY CELL METHOD   metric with its interval
    trials STUDY, hours STUDY, missing STUDY

    python scripts/results_page.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from molf.study.report.markdown import (
    differences_table,
    estimate_text,
    number_text,
    signed,
    table,
)
from molf.study.report.records import read_records
from molf.study.report.statistics import Estimate
from molf.study.report.summary import CellSummary, MethodSummary, summarise

DOCS = Path(__file__).parents[1] / "docs"
STUDIES = DOCS / "studies"
SUFFIX = ".template.md"
NOTICE = "<!-- Written by scripts/results_page.py from a template and docs/studies. -->"


class Study:
    """A stored study.

    Attributes:
        cells: Cells that have rows.
        planned: Names of all cells.
    """

    def __init__(self, folder: Path) -> None:
        records = read_records(folder)
        found = summarise(records)
        self.planned = [cell.name for cell in found]
        self.cells = [cell for cell in found if cell.trials]
        self.seconds = sum(row.get("seconds", 0.0) for row in records.rows)
        self.trials = len(records.rows)

    def method(self, cell: str, name: str) -> MethodSummary:
        """Return a method in a cell."""
        found = next(one for one in self.cells if one.name == cell)
        return next(one for one in found.methods if one.name == name)


def differences(study: Study) -> str:
    """Return the table of differences to the baseline."""
    return "\n".join(differences_table(study.cells))


def controls(study: Study) -> str:
    """Return the table of methods against their share-matched controls."""
    pairs = sorted(
        {(name, one.other) for cell in study.cells for name, all_ in cell.controls.items()
         for one in all_}
    )  # fmt: skip
    rows = []
    for cell in study.cells:
        known = {(n, c.other): c.estimate for n, all_ in cell.controls.items() for c in all_}
        shown = [signed(known[pair]) if pair in known else "missing" for pair in pairs]
        rows.append([cell.name, cell.metric, *shown])
    return "\n".join(table(["cell", "metric", *(f"{a} - {b}" for a, b in pairs)], rows))


def rates(study: Study) -> str:
    """Return the table of the mean and the worst value over the rates."""

    def text(one: MethodSummary) -> str:
        found = one.sensitivity
        return f"{number_text(found.area)} ({number_text(found.worst)})" if found else "missing"

    return _by_method(study, text)


def harm(study: Study, metric: str) -> str:
    """Return the table of a measure of harm."""
    return _by_method(study, lambda one: estimate_text(one.harm.get(metric)))


def shares(study: Study) -> str:
    """Return the table of the shares of updates that `full` took."""

    def text(one: MethodSummary) -> str:
        return "" if one.full_share is None else f"{one.full_share:.0%}"

    return _by_method(study, text)


def tally(study: Study, method: str, control: str | None = None) -> str:
    """Return in how many cells a method is better or worse than the baseline or a control."""
    better, worse, equal = [], [], []
    leads = [cell.name for cell in study.cells if control is None and cell.baseline == method]
    for cell in study.cells:
        estimate = _estimate(cell, method, control)
        if estimate is None:
            continue
        if not estimate.differs:
            equal.append(cell.name)
        elif (estimate.value > 0) != cell.minimize:
            better.append(cell.name)
        else:
            worse.append(cell.name)
    total = len(leads) + len(better) + len(worse) + len(equal)

    def count(names: Sequence[str], word: str) -> str:
        listed = f" ({', '.join(names)})" if names else ""
        return f"{word} in {len(names)}{listed}"

    first = f"{count(leads, 'the baseline')}, " if leads else ""
    return (
        f"{first}{count(better, 'better')}, {count(worse, 'worse')}, undecided in {len(equal)} of "
        f"{total} cells"
    )


def _estimate(cell: CellSummary, method: str, control: str | None) -> Estimate | None:
    if control is not None:
        found = (one for one in cell.controls.get(method, []) if one.other == control)
        return next((one.estimate for one in found), None)
    summary = next(one for one in cell.methods if one.name == method)
    return summary.comparison.estimate if summary.comparison else None


def value(study: Study, cell: str, method: str) -> str:
    """Return the metric of a method in a cell."""
    return estimate_text(study.method(cell, method).value)


def trials(study: Study) -> str:
    """Return the number of ended trials."""
    return str(study.trials)


def hours(study: Study) -> str:
    """Return the hours of all workers."""
    return f"{study.seconds / 3600:.1f}"


def missing(study: Study) -> str:
    """Return the missing rows."""
    known = {cell.name for cell in study.cells}
    lines = [f"- {name}: all rows" for name in study.planned if name not in known]
    lines += [
        f"- {cell.name}, {one.name}: {'; '.join(one.missing)}"
        for cell in study.cells
        for one in cell.methods
        if one.missing
    ]
    return "\n".join(lines) or "none"


def _by_method(study: Study, text: Callable[[MethodSummary], str]) -> str:
    names = [one.name for one in study.cells[0].methods]
    rows = ([cell.name, *(text(one) for one in cell.methods)] for cell in study.cells)
    return "\n".join(table(["cell", *names], rows))


_WORDS = (differences, controls, rates, harm, shares, tally, value, trials, hours, missing)


def page(template: str, folder: Path = STUDIES) -> str:
    """Return the page.

    Args:
        template: Text with `{{WORDS}}`.
        folder: A folder per stored study.

    Raises:
        KeyError: The template has a word that does not exist.
    """
    known: dict[str, Any] = {function.__name__: function for function in _WORDS}
    studies: dict[str, Study] = {}

    def replaced(match: re.Match[str]) -> str:
        word, name, *arguments = match[1].split()
        if name not in studies:
            studies[name] = Study(folder / name)
        text: str = known[word](studies[name], *arguments)
        return text

    return f"{NOTICE}\n\n{re.sub(r'{{(.+?)}}', replaced, template)}"


def pages(folder: Path = DOCS) -> dict[Path, str]:
    """Return the pages of all templates, by path."""
    return {
        path.with_name(path.name.replace(SUFFIX, ".md")): page(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(f"*{SUFFIX}"))
    }


def main(arguments: Iterable[str] | None = None) -> int:
    """Write the pages, or compare them with the stored ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare alone, write nothing")
    options = parser.parse_args(None if arguments is None else list(arguments))
    found = pages()
    if options.check:
        return int(any(path.read_text(encoding="utf-8") != text for path, text in found.items()))
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
