"""One optimizer step over any routed layers and any other tensors: the order of things."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.dense import DenseTensor
from molf.core.fidelity import UpdateTally
from molf.core.guard import FiniteGuard
from molf.core.precision import full_precision
from molf.core.routed import RoutedLayer
from molf.core.routing import Decision


class Outcome(NamedTuple):
    """What a step has done.

    Attributes:
        routing: Decision of every layer, by name.
        nonfinite: Parameters whose gradient has infinity or NaN; if there are any, nothing at all
            was written.
    """

    routing: dict[str, Decision]
    nonfinite: list[Tensor]


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
        RuntimeError: The scores of a layer are not finite; no weight has moved.
    """
    parameters = [p for layer in layers for p in layer.with_gradients]
    parameters += [tensor.parameter for tensor in rest]
    if not parameters:
        return Outcome({}, [])
    home = parameters[0].device
    with full_precision(home.type):
        guard = FiniteGuard(parameters)
        sums = [layer.update_moments(guard) for layer in layers]
        on_host = torch.cat([total.to(home) for total in (guard.gradient_sums, *sums)]).tolist()

        gradient_sums, score_sums = on_host[: len(parameters)], iter(on_host[len(parameters) :])
        if not all(map(math.isfinite, gradient_sums)):
            pairs = zip(parameters, gradient_sums, strict=True)
            return Outcome({}, [p for p, total in pairs if not math.isfinite(total)])
        decisions = [layer.decide([next(score_sums) for _ in layer.experts]) for layer in layers]
        for layer, (winners, _) in zip(layers, decisions, strict=True):
            layer.apply(winners, tally)
        for tensor in rest:
            tensor.adamw(guard, tally)
    names = [layer.name for layer in layers]
    return Outcome(dict(zip(names, [x for _, x in decisions], strict=True)), [])
