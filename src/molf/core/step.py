"""One optimizer step over any routed layers and any other tensors: the order of things."""

from __future__ import annotations

from collections.abc import Sequence
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
            overflow; if there are any, nothing at all was written.
    """

    routing: dict[str, Decision]
    bad: list[Tensor]


def take_step(
    layers: Sequence[RoutedLayer], rest: Sequence[DenseTensor], tally: UpdateTally | None = None
) -> Outcome:
    """Step all routed layers and the tensors that are not routed; all of them have gradients.

    The host waits for the device once, for the checks of all gradients and the scores of all
    layers.

    Args:
        layers: The routed layers.
        rest: What takes a plain AdamW step.
        tally: Where losses of rounding are counted, if anywhere.

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
        guard = FiniteGuard(gradients)
        parts = [] if guard.refuses else [layer.update_moments(guard) for layer in layers]
        flat = [part.to(home) for experts in parts for expert in experts for part in expert]
        on_host = torch.stack([*guard.bounds, *flat]).tolist()

        bounds, score_parts = on_host[: len(parameters)], iter(on_host[len(parameters) :])
        if not all(map(fits, bounds)):
            pairs = zip(parameters, bounds, strict=True)
            return Outcome({}, [parameter for parameter, bound in pairs if not fits(bound)])
        sums = [[sum((next(score_parts) for _ in x), 0.0) for x in experts] for experts in parts]
        decisions = [layer.decide(own) for layer, own in zip(layers, sums, strict=True)]
        for layer, (winners, _) in zip(layers, decisions, strict=True):
            layer.apply(winners, tally)
        for tensor in rest:
            tensor.adamw(guard, tally)
    names = [layer.name for layer in layers]
    return Outcome(dict(zip(names, [x for _, x in decisions], strict=True)), [])
