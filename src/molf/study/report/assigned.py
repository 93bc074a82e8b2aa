"""Rows of method hybrid: assignments by a probe against random ones, and the curve over shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from molf.measure.estimate_texts import estimate_text
from molf.shown import TextTable
from molf.study.assigning.rule import SHAPE, Rule
from molf.study.report.second_phase import MATCHED, Comparison
from molf.study.report.summary import CellSummary, MethodSummary
from molf.study.report.tables import seeds_text
from molf.study.report.texts import UNMATCHED, compared, share_text

TITLE = "Full here, LoRA there"
ABOUT = (
    "Each trial of method hybrid has an assignment of its own, made at its rates and with its "
    "seed. `random` draws other layers with as many weights in full."
)
_ALIKE = "all layers alike in every trial, so that nothing is compared"


def assigned_table(cells: Sequence[CellSummary]) -> TextTable:
    """Return the table of the rows of method hybrid, by cell and by share of weights in full."""
    rows = []
    for cell in cells:
        for one in _by_share(_hybrids(cell)):
            control = _random_of(cell, one)
            own, equal = _against(cell, one, control)
            rows.append(
                [
                    cell.name,
                    one.name,
                    "" if one.rule is None else str(one.rule),
                    *_shares(one),
                    estimate_text(one.value) + seeds_text(one),
                    "" if one.name == cell.baseline else compared(one.comparison),
                    "" if control is None else _beside(own),
                    "" if control is None else _beside(equal),
                ]
            )
    header = [
        *("cell", "method", "assignment", "weights in full", "layers in full", "trials alike"),
        *("metric", "minus baseline", "minus random", "minus random, equal rates"),
    ]
    return TextTable("", tuple(header), tuple(map(tuple, rows)))


def findings(cells: Sequence[CellSummary]) -> list[str]:
    """Return sentences about the rows of method hybrid; empty without a row."""
    found = [cell for cell in cells if any(one.assignments for one in _hybrids(cell))]
    if not found:
        return []
    return [*_random_texts(found), *_shape_texts(found), *_curve_texts(found)]


def _hybrids(cell: CellSummary) -> list[MethodSummary]:
    return [one for one in cell.methods if one.rule or one.assignments]


def _by_share(methods: Iterable[MethodSummary]) -> list[MethodSummary]:
    return sorted(methods, key=lambda one: one.full_share or 0.0)


def _shares(one: MethodSummary) -> list[str]:
    """Return cells: share of weights and number of layers in full, trials with one class."""
    found = one.assignments
    if found is None:
        return [""] * 3
    alike = [f"{count} {kind}" for kind, count in sorted(found.kinds.items()) if kind != "mixed"]
    return [share_text(found.full_weights), f"{found.full_layers:.1f}", ", ".join(alike)]


def _random_of(cell: CellSummary, one: MethodSummary) -> MethodSummary | None:
    """Return the control that draws as many weights as this method has in full."""
    if one.rule is None or one.rule.random:
        return None
    wanted = replace(one.rule, random=True)
    return next((o for o in cell.methods if o.control_of == one.name and o.rule == wanted), None)


def _against(
    cell: CellSummary, one: MethodSummary, control: MethodSummary | None
) -> tuple[Comparison | None, Comparison | None]:
    """Return the comparisons with a control at the rates chosen for each and at equal ones."""
    name = None if control is None else control.name
    pair = next((pair for pair in cell.controls.get(one.name, []) if pair.name == name), None)
    return (None, None) if pair is None else (pair.own, pair.equal)


def _beside(found: Comparison | None) -> str:
    """Return a difference to a control, marked if their shares of weights differ too much."""
    text = compared(found)
    return text if found is None or found.is_matched else f"{text}, {UNMATCHED}"


def _random_texts(cells: Sequence[CellSummary]) -> Iterator[str]:
    """Yield whether probes beat random assignments: over all, and for each method."""
    totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    texts = []
    for name in _names(cells):
        outcomes: list[dict[str, list[str]]] = [{}, {}]
        unmatched: list[list[str]] = [[], []]
        control = None
        for cell in cells:
            one = cell.method(name)
            random = None if one is None else _random_of(cell, one)
            if one is None or random is None:
                continue
            control = random.name
            pair = zip(outcomes, unmatched, totals, _against(cell, one, random), strict=True)
            for groups, others, total, found in pair:
                outcome = "no rows yet" if found is None else found.outcome(minimize=cell.minimize)
                if one.assignments is not None and one.assignments.is_one_class:
                    outcome = _ALIKE
                groups.setdefault(outcome, []).append(cell.name)
                if found is None or found.is_matched:
                    total[outcome] += 1
                else:
                    total[UNMATCHED] += 1
                    others.append(cell.name)
        if control is not None:
            own, equal = map(_outcomes, outcomes, unmatched)
            texts.append(
                f"{name} against {control}, at the rates chosen for each: {own}. At equal rates: "
                f"{equal}."
            )
    if texts:
        yield _verdict(*totals)
        yield from texts


def _verdict(own: Counter[str], equal: Counter[str]) -> str:
    """Return whether probes beat random assignments, from counts at own and at equal rates."""
    shown = ("better", "worse", "no difference shown")
    if not any(total[word] for total in (own, equal) for word in shown):
        return "No comparison of a probe with random at the same share is complete."
    first, second = (
        f"{total['better']} of {sum(total[word] for word in shown)} comparisons "
        f"(worse in {total['worse']})"
        for total in (own, equal)
    )
    text = (
        "A probe is shown to beat random at the same share of weights in full in "
        f"{first} at the rates chosen for each, and in {second} at equal rates."
    )
    if others := own[UNMATCHED] + equal[UNMATCHED]:
        text += (
            f" {others} {'other has' if others == 1 else 'others have'} shares that differ by over "
            f"{MATCHED * 100:g} points."
        )
    return text


def _shape_texts(cells: Sequence[CellSummary]) -> Iterator[str]:
    """Yield in how many trials a probe made the assignment that shape alone makes."""
    for name in _names(cells):
        same = count = 0
        shaped = ""
        for cell in cells:
            one = cell.method(name)
            if one is None or one.rule is None or one.rule.random or one.rule.share:
                continue
            for other in cell.methods:
                if not one.rule.has_probe or other.rule != Rule(one.rule.of, SHAPE):
                    continue
                if one.assignments is None or other.assignments is None:
                    continue
                shaped = other.name
                for seed in one.assignments.keys.keys() & other.assignments.keys.keys():
                    count += 1
                    same += one.assignments.keys[seed] == other.assignments.keys[seed]
        if count:
            yield f"{name} has the assignment of {shaped} in {same} of {count} trials."


def _curve_texts(cells: Sequence[CellSummary]) -> Iterator[str]:
    """Yield from which share of weights in full on the metric is flat, for each score."""
    scores = dict.fromkeys(
        one.rule.of for cell in cells for one in cell.methods if _is_of_curve(one) and one.rule
    )
    for score in scores:
        groups: dict[str, list[str]] = {}
        for cell in cells:
            groups.setdefault(_flat_from(cell, score), []).append(cell.name)
        names = [one.name for one in _curve(cells[0], score)]
        yield (
            f"Curve over the share by {score} ({', '.join(names)}). No two of its rows with at "
            f"least this share in full are shown to differ: {_grouped(groups)}."
        )


def _is_of_curve(one: MethodSummary) -> bool:
    return one.rule is not None and one.rule.has_probe and not one.rule.random


def _curve(cell: CellSummary, score: str) -> list[MethodSummary]:
    """Return the rows of a score by share of weights: from LoRA with the rest trained to fft.

    Of several methods at an end, such as fft at other rates, the first one of the study counts.
    """
    inner = [o for o in cell.methods if _is_of_curve(o) and o.rule and o.rule.of == score]
    none = [o for o in cell.methods if o.options.get("score") == "lora"]
    every = [o for o in cell.methods if o.options.get("method") == "fft"]
    return [*none[:1], *_by_share(inner), *every[:1]]


def _flat_from(cell: CellSummary, score: str) -> str:
    """Return the row from which on the curve of a score is flat, in words."""
    curve = _curve(cell, score)
    if any(one.point is None for one in curve):
        return "no rows yet"
    first = 0
    for number, other in combinations(range(len(curve)), 2):
        found = cell.compare(curve[number], curve[other])
        if found is None or not found.is_complete:
            return "incomplete"
        if found.differs:
            first = max(first, number + 1)
    if first >= len(curve) - 1:
        return "at no share"
    share = _end(curve[first])
    return f"from {curve[first].name} on ({share:.1%})" if first else "at every share"


def _end(one: MethodSummary) -> float:
    """Return the share of weights in full; fft has all and LoRA none."""
    if one.assignments is not None:
        return one.assignments.full_weights
    return 1.0 if one.options.get("method") == "fft" else 0.0


def _names(cells: Sequence[CellSummary]) -> dict[str, None]:
    return dict.fromkeys(one.name for cell in cells for one in _hybrids(cell))


def _outcomes(groups: Mapping[str, Sequence[str]], unmatched: Sequence[str]) -> str:
    """Return the cells by outcome, and those of them with other shares of weights in full."""
    remark = f"; {_grouped({UNMATCHED: unmatched})}" if unmatched else ""
    return _grouped(groups) + remark


def _grouped(groups: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(
        f"{word} in {len(names)} cell{'s' if len(names) > 1 else ''} ({', '.join(names)})"
        for word, names in groups.items()
    )
