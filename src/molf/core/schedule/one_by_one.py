"""Steps with offloaded state: unit by unit, each with its state on the device for its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from molf.core.step.executor import Executor
from molf.core.step.fidelity import UpdateTally
from molf.core.step.guard import bad_gradients
from molf.core.step.layer import States
from molf.core.step.step import Outcome, take_step
from molf.core.step.unit import Unit
from molf.core.storage.offload import StateOffload


def take_one_by_one(
    units: Sequence[Unit],
    states: States,
    offload: StateOffload,
    executor: Executor,
    tally: UpdateTally | None,
    required: Mapping[str, Tensor],
) -> Outcome:
    """Step units whose state is in host memory; arguments and result are those of `take_step`."""
    # All gradients are checked before the first unit is written. Norms of the factors are computed
    # in host memory.
    wrong = [name for name, number in required.items() if not number.isfinite()]
    if len(units) > 1:
        gradients = (one for unit in units for one in unit.gradients(states))
        bad = bad_gradients(gradients, executor.squares)
        if bad:
            return Outcome({}, bad, wrong)
    if wrong:
        return Outcome({}, [], wrong)

    # A function, so that copies on the device are freed when it returns.
    def take_one(unit: Unit) -> Outcome:
        with offload.on_device(states, unit.parameters) as copied:
            return take_step([unit], copied, executor, tally)

    outcomes = [take_one(unit) for unit in units]
    return Outcome(
        {name: one for outcome in outcomes for name, one in outcome.routing.items()},
        [parameter for outcome in outcomes for parameter in outcome.bad],
    )
