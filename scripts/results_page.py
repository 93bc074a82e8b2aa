"""Write the pages of results from their templates and the stored studies.

No figure is typed by hand: a page NAME.md is made from NAME.template.md.

`docs/studies/NAME` holds the CSV files that `molf study report NAME --to docs/studies/NAME` wrote.
A study without it has no rows yet. In a template, `{{WORDS}}` is replaced. Tables:

    chosen STUDY              chosen rates of every method, those at the edge of the grid marked
    differences STUDY         differences to the baseline, by cell and method
    controls STUDY            methods against controls of their share of full updates, by cell
    sensitivity STUDY         mean and worst value over the decade around the chosen rate
    harm STUDY METRIC         forgetting_loss, kl_neutral or kl_task at the chosen rates
    shares STUDY              share of updates that the expert full took
    assigned STUDY            rows of method hybrid by share of weights in full

Sentences:

    tally STUDY METHOD                cells in which a method is better or worse than the baseline
    tally STUDY METHOD CONTROL AT     the same against a control; AT is own (rates) or equal
    harm_tally STUDY METRIC METHOD    cells with less or more harm than the baseline
    harm_tally STUDY METRIC METHOD CONTROL AT    the same against a control
    less_harm STUDY METRIC            by cell, methods with less harm than the baseline, whose
                                      metric is not shown to be worse
    robust STUDY METHOD OTHER         cells with a higher mean over each one's decade of rates
    spread STUDY                      loss by a wrong rate beside differences between methods, of no
                                      controls
    harm_by_rate STUDY METRIC         harm at the lowest against the highest tried rate
    settings STUDY METHOD             chosen rates, and the number of cells of each
    full_range STUDY METHOD           lowest and highest share in full over the cells
    ranges STUDY                      lowest and highest tried rate of the methods
    cost STUDY METHOD OTHER           training time and memory of a run as multiples of another's
    advice STUDY                      preferred baselines, and methods that are better
    assigned_findings STUDY           probes against random assignments; where the curve is flat
    assigned_verdict STUDY            the first of these lines
    decided STUDY                     counts of comparisons with and without a difference
    value STUDY CELL METHOD           metric with its interval
    shared STUDY OTHER                trials that are also trials of another study, trained once
    trials STUDY, hours STUDY, missing STUDY

    python scripts/results_page.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from molf.measure.estimate_texts import estimate_text, markdown_of, number_text, table
from molf.shown import counted
from molf.study.definition import CHOOSE, LEARNING_RATE, LORA_RATE, REPORT
from molf.study.report.assigned import assigned_table, findings
from molf.study.report.rates import rates_of
from molf.study.report.records import Row, is_complete, read_records
from molf.study.report.second_phase import Comparison
from molf.study.report.summary import CellSummary, MethodSummary, summarise
from molf.study.report.tables import controls_table, covered_text, differences_table, seeds_text
from molf.study.report.texts import UNMATCHED

DOCS = Path(__file__).parents[1] / "docs"
STUDIES = DOCS / "studies"
SUFFIX = ".template.md"
NOTICE = "<!-- Written by scripts/results_page.py from a template and docs/studies. -->"
NO_ROWS = "no rows yet"


class Study:
    """A stored study; without a folder, one that has no rows yet.

    Attributes:
        folder: Its folder.
        cells: Cells that have rows.
        planned: Names of all cells.
        rows: All rows.
        own: Names of the methods that are no controls.
        contenders: Names of the methods of which the baseline of a cell is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells: list[CellSummary] = []
        self.planned: list[str] = []
        self.rows: list[Row] = []
        self.own: list[str] = []
        self.contenders: list[str] = []
        if folder.is_dir():
            records = read_records(folder)
            found = summarise(records)
            self.planned = [cell.name for cell in found]
            self.cells = [cell for cell in found if cell.trials]
            self.rows = records.rows
            self.contenders = records.outline["report"]["baseline"]
            self.own = [one.name for one in found[0].methods if one.control_of is None]

    def of(self, name: str) -> list[tuple[CellSummary, MethodSummary]]:
        """Return a method in each cell with rows.

        Raises:
            KeyError: The study has no such method.
        """
        found = [(cell, one) for cell in self.cells if (one := cell.method(name))]
        if self.cells and not found:
            raise KeyError(name)
        return found


# -- tables -------------------------------------------------------------------------------------


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
    return _by_method(study, lambda one: "" if one.full_share is None else f"{one.full_share:.0%}")


def assigned(study: Study) -> str:
    """Return the table of the rows of method hybrid."""
    return "\n".join(markdown_of(assigned_table(study.cells))) if study.cells else NO_ROWS


def assigned_findings(study: Study) -> str:
    """Return what the rows of method hybrid show, as a list."""
    found = findings(study.cells)
    lacking = [name for name in study.planned if name not in _names(study.cells)]
    if found and lacking:
        found.append(f"{NO_ROWS.capitalize()} in {_listed(lacking)}.")
    return "\n".join(f"- {line}" for line in found) or NO_ROWS


def assigned_verdict(study: Study) -> str:
    """Return the first of these lines: probes against random assignments."""
    return assigned_findings(study).splitlines()[0].removeprefix("- ")


def _by_method(study: Study, text: Callable[[MethodSummary], str]) -> str:
    if not study.cells:
        return NO_ROWS
    names = [one.name for one in study.cells[0].methods]
    rows = ([cell.name, *(text(one) for one in cell.methods)] for cell in study.cells)
    return "\n".join(table(["cell", *names], rows))


def _lacking(one: MethodSummary) -> str:
    return "missing" if one.missing else "none: every rate failed" if one.point is None else ""


# -- sentences ----------------------------------------------------------------------------------


def tally(study: Study, method: str, control: str | None = None, at: str = "own") -> str:
    """Return in which cells a method is better or worse than the baseline or a control."""
    groups: dict[str, list[str]] = {
        "the baseline itself": [],
        "better": [],
        "worse": [],
        "no difference shown": [],
        "incomplete": [],
        NO_ROWS: [name for name in study.planned if name not in _names(study.cells)],
    }
    unmatched = []
    for cell, summary in study.of(method):
        if control is None and cell.baseline == method:
            groups["the baseline itself"].append(cell.name)
            continue
        found = _comparison(cell, summary, control, at)
        if control is not None and found is not None and not found.is_matched:
            unmatched.append(cell.name)
        groups[_outcome(cell, found)].append(cell.name)
    remark = f"; {UNMATCHED} in {_listed(unmatched)}" if unmatched else ""
    return _counts(groups) + remark


def _comparison(
    cell: CellSummary, method: MethodSummary, control: str | None, at: str
) -> Comparison | None:
    """Return the comparison with the baseline, or with a control."""
    if control is None:
        return method.comparison
    pair = next((one for one in cell.controls.get(method.name, []) if one.name == control), None)
    return None if pair is None else {"own": pair.own, "equal": pair.equal}[at]


def _outcome(cell: CellSummary, found: Comparison | None) -> str:
    return NO_ROWS if found is None else found.outcome(minimize=cell.minimize)


def harm_tally(
    study: Study, metric: str, method: str, control: str | None = None, at: str = "own"
) -> str:
    """Return in which cells a method does less or more harm than the baseline or a control."""
    groups: dict[str, list[str]] = {
        "the baseline itself": [],
        "less": [],
        "more": [],
        "no difference shown": [],
        "incomplete": [],
        NO_ROWS: [name for name in study.planned if name not in _names(study.cells)],
    }
    for cell, summary in study.of(method):
        found = _comparison(cell, summary, control, at)
        if control is None and cell.baseline == method:
            groups["the baseline itself"].append(cell.name)
        elif found is None or metric not in found.harm:
            groups[NO_ROWS].append(cell.name)
        elif not found.is_complete:
            groups["incomplete"].append(cell.name)
        elif not found.harm[metric].differs:
            groups["no difference shown"].append(cell.name)
        else:
            groups["less" if found.harm[metric].value < 0 else "more"].append(cell.name)
    return _counts(groups)


def less_harm(study: Study, metric: str) -> str:
    """Return by cell the methods with less harm than the baseline and a metric not shown worse."""
    texts = []
    for cell in study.cells:
        found = []
        for one in cell.methods:
            beside = one.comparison
            if one.name == cell.baseline or beside is None or metric not in beside.harm:
                continue
            harm = beside.harm[metric]
            is_worse = beside.outcome(minimize=cell.minimize) == "worse"
            if beside.is_complete and harm.differs and harm.value < 0 and not is_worse:
                found.append(f"`{one.name}`")
        texts.append(f"- {cell.name}: {', '.join(found) or 'none'}.")
    return "\n".join(texts) or NO_ROWS


def robust(study: Study, method: str, other: str) -> str:
    """Return in which cells a method keeps a better mean over its decade of rates than another."""
    groups: dict[str, list[str]] = {
        "a better mean": [],
        "a worse mean": [],
        "an equal mean": [],
        "less than a decade tried": [],
        NO_ROWS: [name for name in study.planned if name not in _names(study.cells)],
    }
    for (cell, one), (_, two) in zip(study.of(method), study.of(other), strict=True):
        mine, theirs = one.sensitivity, two.sensitivity
        if mine is None or theirs is None:
            groups[NO_ROWS].append(cell.name)
        elif not (mine.is_whole and theirs.is_whole):
            groups["less than a decade tried"].append(cell.name)
        elif mine.area == theirs.area:
            groups["an equal mean"].append(cell.name)
        else:
            is_better = (mine.area > theirs.area) != cell.minimize
            groups["a better mean" if is_better else "a worse mean"].append(cell.name)
    return _counts(groups)


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


def full_range(study: Study, method: str) -> str:
    """Return the smallest and the largest share in full of a method over the cells."""
    shares = [one.full_share for _, one in study.of(method) if one.full_share is not None]
    return f"{min(shares):.0%} to {max(shares):.0%}" if shares else NO_ROWS


def cost(study: Study, method: str, other: str) -> str:
    """Return training time and memory of a run as multiples of another method's."""
    parts = []
    for column, name in (
        ("training_seconds", "the training time"),
        ("peak_memory_bytes", "the peak memory"),
    ):
        ratios = [
            median(mine) / median(theirs)
            for cell in study.cells
            if (mine := _column(study, cell, method, column))
            and (theirs := _column(study, cell, other, column))
        ]
        if ratios:
            parts.append(f"{fmean(ratios):.2f} times {name}")
    return f"{' and '.join(parts)} of `{other}`" if parts else NO_ROWS


def _column(study: Study, cell: CellSummary, method: str, column: str) -> list[float]:
    return [
        row[column]
        for row in study.rows
        if (row["cell"], row["method"], row["phase"]) == (cell.name, method, REPORT)
        and is_complete(row)
        and row.get(column)
    ]


def advice(study: Study) -> str:
    """Return which baseline the first phase prefers, and which methods are better than it."""
    leads: dict[str, list[str]] = {}
    better: dict[str, list[str]] = {}
    for cell in study.cells:
        if cell.baseline is None:
            continue
        leads.setdefault(cell.baseline, []).append(cell.name)
        for name in study.own:
            one = cell.method(name)
            if one is not None and _outcome(cell, one.comparison) == "better":
                better.setdefault(name, []).append(cell.name)
    if not leads:
        return f"{NO_ROWS.capitalize()}."
    most = sorted(leads.items(), key=lambda item: -len(item[1]))
    first = "The validation part prefers " + ", ".join(
        f"`{name}` in {_listed(cells)}" for name, cells in most
    )
    if better:
        second = "Shown to be better than this baseline: " + "; ".join(
            f"`{name}` in {_listed(cells)}" for name, cells in better.items()
        )
    else:
        second = "No other method is shown to be better than this baseline in any cell"
    lacking = {
        name: cells
        for name in study.contenders
        if (cells := [c.name for c, one in study.of(name) if c.baseline and one.value is None])
    }
    third = [f"`{name}` has no rows yet in {_listed(cells)}" for name, cells in lacking.items()]
    known = {name for cells in leads.values() for name in cells}
    if rest := [name for name in study.planned if name not in known]:
        third.append(f"nothing is known yet of {_listed(rest)}")
    text = f"{first}. {second}."
    return f"{text} But {', and '.join(third)}." if third else text


def decided(study: Study) -> str:
    """Return how many comparisons of methods with the baseline show a difference."""
    if not study.cells:
        return NO_ROWS
    others = len(study.own) - 1  # one of them is the baseline
    counts = dict.fromkeys(("better", "worse", "no difference shown", "incomplete", NO_ROWS), 0)
    counts[NO_ROWS] = others * (len(study.planned) - len(study.cells))
    for cell in study.cells:
        if cell.baseline is None:
            counts[NO_ROWS] += others
            continue
        for one in cell.methods:
            if one.name in study.own and one.name != cell.baseline:
                counts[_outcome(cell, one.comparison)] += 1
    listed = ", ".join(f"{word} {count}" for word, count in counts.items())
    total = sum(counts.values())
    return f"{total} comparisons of a method with the baseline of its cell: {listed}"


def value(study: Study, cell: str, method: str) -> str:
    """Return the metric of a method in a cell."""
    found = (one for own, one in study.of(method) if own.name == cell)
    return next((estimate_text(one.value) for one in found), NO_ROWS)


def trials(study: Study) -> str:
    """Return the number of ended trials."""
    return str(len(study.rows))


def shared(study: Study, other: str) -> str:
    """Return the number of trials that are also trials of another study: the same trainings."""
    known = {(row["key"], row.get("started")) for row in Study(study.folder.parent / other).rows}
    return str(sum((row["key"], row.get("started")) in known for row in study.rows))


def hours(study: Study) -> str:
    """Return the hours of all workers."""
    return f"{sum(row.get('seconds', 0.0) for row in study.rows) / 3600:.1f}"


def missing(study: Study) -> str:
    """Return the missing and failed rows."""
    if not study.planned:
        return NO_ROWS
    known = _names(study.cells)
    lines = [f"- {name}: all rows" for name in study.planned if name not in known]
    for cell in study.cells:
        for one in cell.methods:
            lacking = list(one.missing)
            if one.failed_seeds:
                lacking.append(f"failed seeds {', '.join(map(str, one.failed_seeds))}")
            if lacking:
                lines.append(f"- {cell.name}, {one.name}: {'; '.join(lacking)}")
    return "\n".join(lines) or "none"


def _names(cells: Iterable[CellSummary]) -> list[str]:
    return [cell.name for cell in cells]


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} cell{'s' if len(names) > 1 else ''} ({', '.join(names)})"


def _counts(groups: Mapping[str, Sequence[str]]) -> str:
    found = [f"{word} in {_listed(names)}" for word, names in groups.items() if names]
    lacking = len(groups[NO_ROWS])
    if found and lacking:  # the list of missing rows has their names
        found[-1] = f"{NO_ROWS} in {lacking} cell{'s' if lacking > 1 else ''}"
    return ", ".join(found) or NO_ROWS


_WORDS = (
    *(chosen, differences, controls, sensitivity, harm, shares, tally, harm_tally, less_harm),
    *(
        robust,
        assigned,
        assigned_findings,
        assigned_verdict,
        spread,
        harm_by_rate,
        settings,
        ranges,
        full_range,
    ),
    *(cost, advice),
    *(decided, value, trials, shared, hours, missing),
)


def page(template: str, folder: Path | None = None) -> str:
    """Return the page.

    Args:
        template: Text with `{{WORDS}}`.
        folder: A folder per stored study; None for that of the repository.

    Raises:
        KeyError: The template has a word that does not exist, or a method that the study lacks.
    """
    known: dict[str, Any] = {function.__name__: function for function in _WORDS}
    studies: dict[str, Study] = {}

    def replaced(match: re.Match[str]) -> str:
        word, name, *arguments = match[1].split()
        if name not in studies:
            studies[name] = Study((folder or STUDIES) / name)
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
        return int(
            any(
                not path.is_file() or path.read_text(encoding="utf-8") != text
                for path, text in found.items()
            )
        )
    for path, text in found.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
