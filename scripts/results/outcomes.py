"""Sentences that count in which cells a method is better or worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from molf.study.report.assigned import findings
from molf.study.report.second_phase import Comparison
from molf.study.report.summary import CellSummary, MethodSummary
from molf.study.report.texts import UNMATCHED
from results.stored import NO_ROWS, Study, cells_text


def tally(study: Study, method: str, control: str | None = None, at: str = "own") -> str:
    """Return in which cells a method is better or worse than the baseline or another method."""
    groups: dict[str, list[str]] = {
        "the baseline itself": [],
        "better": [],
        "worse": [],
        "no difference shown": [],
        "incomplete": [],
        NO_ROWS: list(study.without_rows),
    }
    unmatched = []
    for cell, summary in study.of(method):
        if control is None and cell.baseline == method:
            groups["the baseline itself"].append(cell.name)
            continue
        found = _comparison(cell, summary, control, at)
        if found is not None and not found.is_matched and _is_control(cell, summary, control):
            unmatched.append(cell.name)
        groups[_outcome(cell, found)].append(cell.name)
    remark = f"; {UNMATCHED} in {cells_text(unmatched)}" if unmatched else ""
    return _counts(groups) + remark


def harm_tally(
    study: Study, metric: str, method: str, control: str | None = None, at: str = "own"
) -> str:
    """Return in which cells a method does less or more harm than the baseline or another one."""
    groups: dict[str, list[str]] = {
        "the baseline itself": [],
        "less": [],
        "more": [],
        "no difference shown": [],
        "incomplete": [],
        NO_ROWS: list(study.without_rows),
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
        NO_ROWS: list(study.without_rows),
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
        f"`{name}` in {cells_text(cells)}" for name, cells in most
    )
    if better:
        second = f"Shown to be better than this baseline: {_better_texts(better)}"
    else:
        second = "No other method is shown to be better than this baseline in any cell"
    lacking = {
        name: cells
        for name in study.contenders
        if (cells := [c.name for c, one in study.of(name) if c.baseline and one.value is None])
    }
    third = [f"`{name}` has no rows yet in {cells_text(cells)}" for name, cells in lacking.items()]
    known = {name for cells in leads.values() for name in cells}
    if rest := [name for name in study.planned if name not in known]:
        third.append(f"nothing is known yet of {cells_text(rest)}")
    text = f"{first}. {second}."
    return f"{text} But {', and '.join(third)}." if third else text


def better_than(study: Study, other: str) -> str:
    """Return which methods are better than another one, each at its own rates."""
    better: dict[str, list[str]] = {}
    for cell, beside in study.of(other):
        for name in study.own:
            one = cell.method(name)
            if name == other or one is None:
                continue
            if _outcome(cell, cell.compare(one, beside)) == "better":
                better.setdefault(name, []).append(cell.name)
    if not study.cells:
        return NO_ROWS
    if not better:
        return f"no method is shown to be better than `{other}` in any cell"
    return f"shown to be better than `{other}`: {_better_texts(better)}"


def _better_texts(cells: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"`{name}` in {cells_text(names)}" for name, names in cells.items())


def assigned_findings(study: Study) -> str:
    """Return what the rows of method hybrid show, as a list."""
    found = findings(study.cells)
    if found and study.without_rows:
        found.append(f"{NO_ROWS.capitalize()} in {cells_text(study.without_rows)}.")
    return "\n".join(f"- {line}" for line in found) or NO_ROWS


def assigned_verdict(study: Study) -> str:
    """Return the first of these lines: probes against random assignments."""
    return assigned_findings(study).splitlines()[0].removeprefix("- ")


def _comparison(
    cell: CellSummary, method: MethodSummary, control: str | None, at: str
) -> Comparison | None:
    """Return the comparison with the baseline, a control, or another method.

    Raises:
        KeyError: The study has no such method, or, at equal rates, it is no control of this one.
    """
    if control is None:
        return method.comparison
    pair = next((one for one in cell.controls.get(method.name, []) if one.name == control), None)
    if pair is not None:
        return {"own": pair.own, "equal": pair.equal}[at]
    if _is_control(cell, method, control):
        return None
    other = cell.method(control)
    if other is None or at != "own":
        raise KeyError(control)
    return cell.compare(method, other)


def _is_control(cell: CellSummary, method: MethodSummary, other: str | None) -> bool:
    """Return whether another method is a control of this one."""
    found = None if other is None else cell.method(other)
    return found is not None and found.control_of == method.name


def _outcome(cell: CellSummary, found: Comparison | None) -> str:
    return NO_ROWS if found is None else found.outcome(minimize=cell.minimize)


def _counts(groups: Mapping[str, Sequence[str]]) -> str:
    found = [f"{word} in {cells_text(names)}" for word, names in groups.items() if names]
    lacking = len(groups[NO_ROWS])
    if found and lacking:  # the list of missing rows has their names
        found[-1] = f"{NO_ROWS} in {lacking} cell{'s' if lacking > 1 else ''}"
    return ", ".join(found) or NO_ROWS
