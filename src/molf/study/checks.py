"""Check the options, the data and the models of all cells before the first trial."""

from __future__ import annotations

from datetime import datetime

from molf.errors import InputError
from molf.job.inputs import Inputs
from molf.job.model.path import check_model
from molf.job.record.assignment_source import read_assignment_source
from molf.job.run import checked
from molf.study.definition import EVAL_PART, PARTS, Study
from molf.study.plan import Plan, TrialMaker


def check_options(study: Study, make: TrialMaker) -> None:
    """Make the trials that are known before any result, which checks their options.

    Raises:
        InputError: The options of a cell and a method do not fit together.
    """
    try:
        Plan(study, {}, make, {})
    except InputError as error:
        raise InputError(f"study {study.name}: {error}") from error


def check_data(study: Study, make: TrialMaker, inputs: Inputs) -> None:
    """Load the data of each cell in both phases; check that models and assignments exist.

    Args:
        study: The study.
        make: Makes the planned trials.
        inputs: Loads the data; what it keeps is not loaded again by trials.

    Raises:
        InputError: Data, a model or an assignment is missing or invalid, or data has no validation
            part.
    """
    for method in study.methods:
        if (assignment := method.options.get("assignment")) is None:
            continue
        try:
            read_assignment_source(str(assignment))
        except InputError as error:
            raise InputError(f"study {study.name}, method {method.name}: {error}") from error
    for cell in study.cells:
        for phase, seeds in study.seeds.items():
            trial = make(cell, study.methods[0], phase, 0, seeds[0], {}, None)
            try:
                settings = checked(trial.settings, datetime.now())
                check_model(settings.model)
                inputs.task(settings.task_options)
            except InputError as error:
                part = f"{EVAL_PART}={PARTS[phase]}"
                raise InputError(
                    f"study {study.name}, cell {cell.name}, {part}: {error}"
                ) from error
