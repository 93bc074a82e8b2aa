"""Build the page of one run or several; at the end of a command its failure is a warning."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from molf.errors import InputError
from molf.job.record.ownership import REPORT
from molf.report.run_data import RunData, read_run_data

MOST_BINS, MOST_BINS_BESIDE = 400, 200  # bins of time of one run, and of several on a page
MOST_RUNS = 12


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read the runs of one page, and give each a label that differs from the others'.

    Raises:
        InputError: A directory is no run, comes twice, or there are too many.
    """
    if len(paths) > MOST_RUNS:
        raise InputError(f"{len(paths)} runs are too many for one page. Give at most {MOST_RUNS}.")
    places = Counter(path.expanduser().resolve() for path in paths)
    twice = [str(place) for place, count in places.items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]} is given twice.")
    bins = MOST_BINS if len(paths) == 1 else MOST_BINS_BESIDE
    runs = [read_run_data(path, most_bins=bins) for path in paths]
    names = Counter(run.name for run in runs)
    for run in runs:
        if names[run.name] > 1:
            place = run.path.resolve()
            run.label = f"{place.parent.name}/{place.name}"
    return runs


def page_at_end(directory: Path) -> Path | None:
    """Write the page of a finished run or evaluation; None if that failed.

    Warns:
        UserWarning: The page was not written: the run is complete without it.
    """
    try:
        from molf.report.page import render
        from molf.report.place import page_place, write_page

        path = page_place([directory], None, overwrite=False)
        write_page(render(read_runs([directory])), path)
    except Exception as error:
        warnings.warn(
            f"{REPORT} was not written: {error or type(error).__name__}. molf report {directory} "
            "writes it later.",
            stacklevel=2,
        )
        return None
    return path
