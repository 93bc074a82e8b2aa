"""Check the options, the data and the models of all cells before the first trial."""

from __future__ import annotations

import warnings
from dataclasses import replace
from datetime import datetime

from molf.errors import InputError
from molf.job.inputs import Inputs
from molf.job.model.path import check_model
from molf.job.record.assignment_source import read_assignment_source
from molf.job.run import checked
from molf.job.settings.experts import method_config
from molf.job.settings.resolved import without_effect
from molf.study.assigning.trial_rule import TrialRule
from molf.study.definition import (
    EVAL_PART,
    LEARNING_RATE,
    LORA_RATE,
    PARTS,
    RATIO,
    Cell,
    Method,
    Study,
)
from molf.study.plan import Plan, TrialMaker
from molf.study.rates import limits

_ALIKE = 1.2  # ratio of scalings below which they are not named: alpha of LoRA is rounded


def check_options(study: Study, make: TrialMaker) -> None:
    """Make the trials that are known before any result, which checks their options.

    Raises:
        InputError: The options of a cell and a method do not fit together, a rate has no effect, or
            a share-matched control differs from its method in more than the score.
    """
    try:
        for cell in study.cells:
            for method in study.methods:
                _check_effect(study, make, cell, method)
                _check_share_of(study, make, cell, method)
                _check_rule(study, make, cell, method)
        Plan(study, {}, make, {})
    except InputError as error:
        raise InputError(f"study {study.name}: {error}") from error


def _check_effect(study: Study, make: TrialMaker, cell: Cell, method: Method) -> None:
    settings = make.options(cell, method)
    kind = settings.method
    for name in limits(study.rates(cell, method)):
        if name != LEARNING_RATE and LORA_RATE in without_effect(kind):
            raise InputError(
                f"cells, {cell.name}: {name} has no effect with method={kind} ({method.name}). "
                f"Give {LEARNING_RATE} alone."
            )
        if name != LORA_RATE and not settings.trains_dense:
            raise InputError(
                f"cells, {cell.name}: {name} is no rate of method={kind} ({method.name}), which "
                f"trains LoRA factors alone. Give {LORA_RATE} alone."
            )


def _check_share_of(study: Study, make: TrialMaker, cell: Cell, method: Method) -> None:
    if method.share_of is None:
        return
    model = study.method(method.share_of)
    own = make.options(cell, method)
    wanted = replace(make.options(cell, model), score=own.score)
    names = [name for name, value in vars(own).items() if getattr(wanted, name) != value]
    if names:
        name = names[0]
        raise InputError(
            f"methods, {method.name}: {name}={getattr(own, name)} differs from that of "
            f"{model.name}, {getattr(wanted, name)}. With share_of only the score may differ."
        )


def _check_rule(study: Study, make: TrialMaker, cell: Cell, method: Method) -> None:
    if method.rule is None:
        return
    tried = set(limits(study.rates(cell, method)))
    if LEARNING_RATE not in tried or not tried & {LORA_RATE, RATIO}:
        raise InputError(
            f"cells, {cell.name}: a trial of {method.name} needs {LEARNING_RATE}, and {LORA_RATE} "
            f"or {RATIO}, for full layers and the adapter. Give both."
        )
    if method.rule.has_probe:
        settings = make.options(cell, study.method(method.rule.of))
        TrialRule(method.rule, settings).probe_at({})


def differing_scalings(study: Study, make: TrialMaker) -> list[str]:
    """Return a line per cell whose methods differ in the scaling of LoRA factors.

    A default of alpha that depends on the method is no option of the study file, and changes the
    size of steps as a rate does. Methods `hybrid` are left out: their assignment has the scaling.
    """
    lines = []
    for cell in study.cells:
        configs = {m.name: method_config(make.options(cell, m)) for m in study.methods}
        scalings = {name: config.scalings for name, config in configs.items() if config is not None}
        found = [one for own in scalings.values() for one in own]
        if not found or max(found) < _ALIKE * min(found):
            continue
        methods: dict[str, list[str]] = {}
        for name, own in scalings.items():
            text = " and ".join(dict.fromkeys(f"{one:.3g}" for one in own))
            methods.setdefault(text, []).append(name)
        listed = "; ".join(f"{text} ({', '.join(names)})" for text, names in methods.items())
        lines.append(f"{cell.name}: {listed}")
    return lines


def check_data(study: Study, make: TrialMaker, inputs: Inputs) -> None:
    """Load the data of each cell in both phases; check its model and its metric, and assignments.

    Args:
        study: The study.
        make: Makes the planned trials.
        inputs: Loads the data, and keeps it for the trials.

    Raises:
        InputError: Data, a model or an assignment is missing or invalid, the data has no validation
            part, or the task does not measure the metric on it.
    """
    from molf.job.libraries import quiet_libraries

    with quiet_libraries():
        for method in study.methods:
            _check_given(study, method)
        for cell in study.cells:
            _check_cell(study, make, inputs, cell)
            _check_assignments(study, make, cell)


def _check_given(study: Study, method: Method) -> None:
    """Read the assignment that the options of a method name."""
    if (assignment := method.options.get("assignment")) is None:
        return
    try:
        read_assignment_source(str(assignment))
    except InputError as error:
        raise InputError(f"study {study.name}, method {method.name}: {error}") from error


def _check_cell(study: Study, make: TrialMaker, inputs: Inputs, cell: Cell) -> None:
    """Load the data of both phases, and look for the model and the metric."""
    for phase, seeds in study.seeds.items():
        trial = make(cell, study.methods[0], phase, 0, seeds[0], {}, None)
        try:
            settings = checked(trial.settings, datetime.now())
            check_model(settings.model)
            metrics = inputs.task(settings.task_options).metric_names()
            if cell.metric not in metrics:
                raise InputError(
                    f"task={settings.task} does not measure {cell.metric} on this data. It "
                    f"measures {', '.join(metrics)}."
                )
        except InputError as error:
            part = f"{EVAL_PART}={PARTS[phase]}"
            raise InputError(f"study {study.name}, cell {cell.name}, {part}: {error}") from error


def _check_assignments(study: Study, make: TrialMaker, cell: Cell) -> None:
    """Compare the given assignments and patterns with the layers of the cell's model.

    Raises:
        InputError: With the cell, the method and the layers that differ.
    """
    for method in study.methods:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each trial warns
                _check_assignment(study, make, cell, method)
        except InputError as error:
            raise InputError(
                f"study {study.name}, cell {cell.name}, method {method.name}: {error}"
            ) from error


def _check_assignment(study: Study, make: TrialMaker, cell: Cell, method: Method) -> None:
    settings = make.options(cell, method)
    if method.rule is not None:
        if not method.rule.has_probe:
            from molf.study.assigning.making import without_probe

            without_probe(method.rule, make.options(cell, study.method(method.rule.of)))
    elif settings.assignment is not None:
        from molf.job.model.loading import load_skeleton

        model = load_skeleton(checked(settings, datetime.now()).model)
        read_assignment_source(settings.assignment).assignment(model)
