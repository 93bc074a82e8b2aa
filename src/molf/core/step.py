"""One optimizer step over any routed layers and any other tensors: the order of things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.dense import DenseTensor
from molf.core.fidelity import UpdateTally
from molf.core.guard import FiniteGuard, Guarded, fits
from molf.core.precision import full_precision
from molf.core.routed import RoutedLayer
from molf.core.routing import Decision


class Outcome(NamedTuple):
    """What a step has done.

    Attributes:
        routing: Decision of every layer, by name.
        bad: Parameters whose gradient has infinity or NaN, or is so large that moments would
            overflow.
        wrong: Names of the required numbers that are not finite. If there is any of either, nothing
            at all was written.
    """

    routing: dict[str, Decision]
    bad: list[Tensor]
    wrong: Sequence[str] = ()

    @property
    def is_refused(self) -> bool:
        """Whether the step was not taken."""
        return bool(self.bad or self.wrong)


def take_step(
    layers: Sequence[RoutedLayer],
    rest: Sequence[DenseTensor],
    tally: UpdateTally | None = None,
    required: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Step all routed layers and the tensors that are not routed; all of them have gradients.

    The host waits for the device once, for the checks of all gradients and the scores of all
    layers.

    Args:
        layers: The routed layers.
        rest: What takes a plain AdamW step.
        tally: Where losses of rounding are counted, if anywhere.
        required: Further numbers that must be finite for the step to happen, 0-dim, by name.

    Raises:
        RuntimeError: The scores of a layer are not finite, because its moments were not; no weight
            has moved.
    """
    gradients = [one for layer in layers for one in layer.gradients]
    gradients += [Guarded(tensor.parameter) for tensor in rest]
    if not gradients:
        return Outcome({}, [])
    parameters = [one.parameter for one in gradients]
    home = parameters[0].device
    with full_precision({parameter.device.type for parameter in parameters}):
        required = required or {}
        guard = FiniteGuard(gradients, required.values())
        parts = [] if guard.refuses else [layer.update_moments(guard) for layer in layers]
        flat = [part.to(home) for experts in parts for expert in experts for part in expert]
        on_host = torch.stack([*guard.bounds, *flat]).tolist()

        bounds, score_parts = on_host[: len(guard.bounds)], iter(on_host[len(guard.bounds) :])
        if not all(map(fits, bounds)):
            return refused(parameters, required, bounds)
        sums = [[sum((next(score_parts) for _ in x), 0.0) for x in experts] for experts in parts]
        decisions = [layer.decide(own) for layer, own in zip(layers, sums, strict=True)]
        for layer, (winners, _) in zip(layers, decisions, strict=True):
            layer.apply(winners, tally)
        for tensor in rest:
            tensor.adamw(guard, tally)
    names = [layer.name for layer in layers]
    return Outcome(dict(zip(names, [x for _, x in decisions], strict=True)), [])


def refused(
    parameters: Sequence[Tensor], required: Mapping[str, Tensor], bounds: Sequence[float]
) -> Outcome:
    """Return the outcome of a step that the bounds forbid, those of parameters first."""
    bad = [not fits(bound) for bound in bounds]
    return Outcome(
        {},
        [parameter for parameter, is_bad in zip(parameters, bad, strict=False) if is_bad],
        [name for name, is_bad in zip(required, bad[len(parameters) :], strict=True) if is_bad],
    )
