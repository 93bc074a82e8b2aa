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
    against STUDY OTHER METHOD ...    methods minus another one, metric and harm

Sentences:

    tally STUDY METHOD                cells in which a method is better or worse than the baseline
    tally STUDY METHOD OTHER AT       the same against another method; AT is own (rates), or, for a
                                      control, equal
    harm_tally STUDY METRIC METHOD    cells with less or more harm than the baseline
    harm_tally STUDY METRIC METHOD OTHER AT      the same against another method
    less_harm STUDY METRIC            by cell, methods with less harm than the baseline, whose
                                      metric is not shown to be worse
    robust STUDY METHOD OTHER         cells with a higher mean over each one's decade of rates
    spread STUDY                      loss by a wrong rate beside differences between methods, of no
                                      controls
    harm_by_rate STUDY METRIC         harm at the lowest against the highest tried rate
    settings STUDY METHOD             chosen rates, and the number of cells of each
    untrained STUDY                   metric of the base, by cell
    full_range STUDY METHOD           lowest and highest share in full over the cells
    ranges STUDY                      lowest and highest tried rate of the methods
    memory STUDY METHOD OTHER         peak memory of a run as a multiple of another's
    better_than STUDY OTHER           methods that are better than another one, at their own rates
    advice STUDY                      preferred baselines, and methods that are better
    assigned_findings STUDY           probes against random assignments; where the curve is flat
    assigned_verdict STUDY            the first of these lines
    decided STUDY                     counts of comparisons with and without a difference
    shared STUDY OTHER                trials that are also trials of another study, trained once
    trials STUDY, hours STUDY, missing STUDY

    python scripts/results_page.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from results import amounts, outcomes, rates, tables
from results.stored import STUDIES, Study

DOCS = Path(__file__).parents[1] / "docs"
SUFFIX = ".template.md"
NOTICE = "<!-- Written by scripts/results_page.py from a template and docs/studies. -->"

_WORDS: dict[str, Any] = {
    function.__name__: function
    for function in (
        *(tables.chosen, tables.differences, tables.methods, tables.controls, tables.sensitivity),
        *(tables.harm, tables.shares, tables.assigned, tables.against),
        *(outcomes.tally, outcomes.harm_tally, outcomes.less_harm, outcomes.robust),
        *(outcomes.advice, outcomes.better_than, outcomes.decided),
        *(outcomes.assigned_findings, outcomes.assigned_verdict),
        *(rates.spread, rates.harm_by_rate, rates.settings, rates.ranges),
        *(amounts.untrained, amounts.full_range, amounts.memory),
        *(amounts.trials, amounts.shared, amounts.hours, amounts.missing),
    )
}


def page(template: str, folder: Path | None = None) -> str:
    """Return the page.

    Args:
        template: Text with `{{WORDS}}`.
        folder: A folder per stored study; None for that of the repository.

    Raises:
        KeyError: The template has a word that does not exist, or a method that the study lacks.
    """
    studies: dict[str, Study] = {}

    def replaced(match: re.Match[str]) -> str:
        word, name, *arguments = match[1].split()
        if name not in studies:
            studies[name] = Study((folder or STUDIES) / name)
        text: str = _WORDS[word](studies[name], *arguments)
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
