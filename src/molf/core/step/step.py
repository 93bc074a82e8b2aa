"""One optimizer step: check gradients, update moments, choose winners, write.

docs/architecture.md has a drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.adam import sum_dtype
from molf.core.arithmetic.devices import upload
from molf.core.arithmetic.precision import full_precision
from molf.core.scores.registry import routing
from molf.core.scores.rules import Winners
from molf.core.step.decision import Decision
from molf.core.step.dense import DenseTensor
from molf.core.step.executor import Executor, Owner, ScoreSums
from molf.core.step.fidelity import UpdateTally
from molf.core.step.guard import FiniteGuard, Guarded, fits
from molf.core.step.layer import RoutedLayer, States
from molf.core.step.unit import Unit
from molf.core.storage.collectives import Processes


class Outcome(NamedTuple):
    """Result of a step. If `bad` or `wrong` has an entry, nothing was written.

    Attributes:
        routing: Decision of every layer, by name.
        bad: Parameters with an infinite or NaN gradient, or one whose moments would overflow.
        wrong: Names of the required numbers that are not finite.
    """

    routing: dict[str, Decision]
    bad: list[Tensor]
    wrong: Sequence[str] = ()

    @property
    def is_refused(self) -> bool:
        """Whether the step was not taken."""
        return bool(self.bad or self.wrong)


def take_step(
    units: Sequence[Unit],
    states: States,
    executor: Executor,
    tally: UpdateTally | None = None,
    required: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Step units that all have gradients. The host waits for the device once.

    On shards, all processes call it with the same units, and get the same outcome.

    Args:
        units: Routed layers and plain tensors; on shards, with local parts and their places.
        states: States of their parameters; missing ones are created.
        executor: Runs the operations.
        tally: Measures updates lost to rounding, if given.
        required: Further numbers that must be finite, 0-dim, by name; on shards, each process has
            its own.

    Raises:
        RuntimeError: The scores of a layer are not finite, because its moments were not. No weight
            has changed.
        ValueError: The executor does not support a parameter or gradient. Nothing was written.
    """
    if not units:
        return Outcome({}, [])
    opened = [unit.open(states, executor.can_read) for unit in units]
    layers = [one for one in opened if isinstance(one, RoutedLayer)]
    plain = [one for one in opened if isinstance(one, DenseTensor)]
    gradients = [one for layer in layers for one in layer.gradients]
    gradients += [Guarded(tensor.parameter) for tensor in plain]
    required = required or {}
    processes = units[0].located[0].processes
    # In every step, before anything is written: libraries may have replaced parameters.
    with full_precision({one.parameter.device.type for one in gradients}):
        # 1. Check gradients. Gradients of LoRA factors do not exist yet; norms bound them.
        guard = FiniteGuard(
            gradients, required.values(), executor.squares, executor.can_read, processes
        )
        count = len(guard.bounds)
        owners: Sequence[Owner] = ()
        numbers = guard.bounds
        # 2. Update moments and sum score terms. On an accelerator the host does not know yet
        # whether the gradients are finite; the update multiplies by `guard.finite` on the device,
        # so a bad step changes no bit. On a CPU `refuses` is known here.
        if layers and not guard.refuses:
            found = executor.update_moments(layers, guard)
            sums, owners = _totals(layers, found, numbers.device, processes)
            numbers = torch.cat([numbers, sums])
        # 3. The only synchronisation: bounds and score sums together.
        on_host = numbers.tolist()

        if not all(map(fits, on_host[:count])):
            return _refused([one.parameter for one in gradients], required, on_host[:count])
        decisions = _decide(layers, owners, on_host[count:])
        won = [winners for winners, _ in decisions]
        # 4. Write. Losers keep their weights.
        executor.write(zip(layers, won, strict=True), plain, guard, tally)
        if tally is not None:
            tally.add_up(processes, numbers.device)
    return Outcome({layer.name: one for layer, (_, one) in zip(layers, decisions, strict=True)}, [])


def _totals(
    layers: Sequence[RoutedLayer], sums: ScoreSums, home: torch.device, processes: Processes
) -> tuple[Tensor, Sequence[Owner]]:
    """Return the sum of each term over each whole tensor, with its owner.

    Args:
        layers: The layers.
        sums: Partial sums of this process.
        home: Device of the result.
        processes: Processes that share the tensors.
    """
    # From the structure of the layers, so that all processes have the same; a shard may be empty.
    owners = [
        Owner(number, expert, part, term.name)
        for number, layer in enumerate(layers)
        for expert, part in layer.parts
        for term in layer.score.terms
    ]
    places = {owner: index for index, owner in enumerate(owners)}
    own = torch.tensor([places[owner] for owner in sums.owners], dtype=torch.int64, device="cpu")
    totals = torch.zeros(len(owners), dtype=sum_dtype(home), device=home)
    # It adds in the order of the blocks; `index_add_` has no fixed order on CUDA.
    totals.index_put_((upload(own, home),), sums.numbers.to(totals.dtype), accumulate=True)
    return processes.sum(totals), owners


def _decide(
    layers: Sequence[RoutedLayer], owners: Sequence[Owner], numbers: Sequence[float]
) -> list[tuple[Winners, Decision]]:
    """Choose the winners of every layer from the sums of its tensors."""
    sums: list[dict[tuple[int, int, str], float]] = [{} for _ in layers]
    for (number, expert, part, term), total in zip(owners, numbers, strict=True):
        sums[number][expert, part, term] = total
    candidates = [layer.candidates(own) for layer, own in zip(layers, sums, strict=True)]
    winners: list[Winners] = [()] * len(layers)
    # All layers have one score, unless groups were edited.
    for text in {layer.group["score"]: None for layer in layers}:
        own = [number for number, layer in enumerate(layers) if layer.group["score"] == text]
        chosen = routing(text).rule.choose([candidates[number] for number in own])
        for number, won in zip(own, chosen, strict=True):
            winners[number] = won
    return [
        (won, Decision.of(layer.experts, won, one.scores))
        for layer, won, one in zip(layers, winners, candidates, strict=True)
    ]


def _refused(
    parameters: Sequence[Tensor], required: Mapping[str, Tensor], bounds: Sequence[float]
) -> Outcome:
    """Return the outcome of a refused step."""
    # Bounds of the parameters come first, then those of the required numbers.
    bad = [not fits(bound) for bound in bounds]
    return Outcome(
        {},
        [parameter for parameter, is_bad in zip(parameters, bad, strict=False) if is_bad],
        [name for name, is_bad in zip(required, bad[len(parameters) :], strict=True) if is_bad],
    )
