"""Take finished trials from the stored form of a study, such as after its machine was lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from molf.errors import InputError
from molf.measure.meanings import METRICS_VERSION
from molf.study.definition import Study
from molf.study.outcome import all_results, point_of, result_file, write_result
from molf.study.place import plan_of, write_record
from molf.study.plan import TrialMaker
from molf.study.report.records import Row, is_complete, read_records, stored_results
from molf.study.status import metrics_version


@dataclass(frozen=True)
class Restored:
    """The stored trials that a study took.

    Attributes:
        taken: Finished trials that were written to the study's directory.
        present: Finished trials that the directory had already.
        left_out: Finished trials that are not part of the study.
        unfinished: Stored trials that failed or were pruned; they are not taken.
        other_metrics: Trials among those taken whose metrics have another version than new ones.
    """

    taken: int
    present: int
    left_out: int
    unfinished: int
    other_metrics: int


def restore(study: Study, make: TrialMaker, folder: Path) -> Restored:
    """Write the finished trials of a stored study to a study's directory.

    A trial is taken if the study has one of the same identity: equal cell, method, phase, point,
    seed, options and contents of local data. The stored study may have another name.

    Args:
        study: The study; its directory is created if it has none.
        make: Makes its trials.
        folder: A folder that `molf study report` wrote.

    Raises:
        InputError: The folder holds no stored study, or none of its trials is part of the study.
    """
    records = read_records(folder)
    stored = stored_results(records)
    present = all_results(study)
    planned = plan_of(study, make, stored | present).by_key
    wanted = [key for key in stored if key in planned and key not in present]
    known = sum(key in present for key in stored)
    if stored and not wanted and not known:
        raise InputError(
            f"None of the {len(stored)} finished trials in {folder} is a trial of {study.name}: "
            "cells, methods, rates, seeds, options or data differ. Give the folder of this study."
        )
    write_record(study)
    for key in wanted:
        trial, result = planned[key], stored[key]
        place = (trial.cell.name, trial.method.name, trial.label(point_of(result.row)))
        write_result(result_file(study, *place), result)
    return Restored(
        taken=len(wanted),
        present=known,
        left_out=len(stored) - len(wanted) - known,
        unfinished=sum(not is_complete(row) for row in records.rows),
        other_metrics=sum(_is_older(stored[key].row) for key in wanted),
    )


def _is_older(row: Row) -> bool:
    """Return whether a new trial measures a metric of a row in another way."""
    return metrics_version(row) != metrics_version(row, METRICS_VERSION)
