"""A whole optimizer step made of the kernels: what `molf.core.step` does with torch operations.

Opt-in (`kernels="triton"`) and not yet run on a GPU. The state is that of the eager path, so a run
may be saved in one and resumed in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from molf.core.adam import gradient, sum_dtype
from molf.core.dense import DenseTensor
from molf.core.fidelity import UpdateTally
from molf.core.fused.items import AdamW, Factor, LowRank, Moments
from molf.core.fused.kernels import Kernels
from molf.core.fused.layer import FusedLayer, Move
from molf.core.fused.table import upload
from molf.core.guard import bound_of, fits, largest_norm, may_happen
from molf.core.kernels import check_kernel_parameter
from molf.core.precision import full_precision
from molf.core.routed import RoutedLayer, States
from molf.core.step import Outcome, refused

_CHUNK_BYTES = 64 << 20  # of what a step allocates for several layers at a time

_T = TypeVar("_T")


class _Pending(NamedTuple):
    """The next writes, until the operands that wait for them are large enough."""

    moves: list[Move]
    factors: list[Factor]


class FusedStep:
    """Takes steps with the kernels, of parameters that are all on one device.

    Args:
        chunk_bytes: Layers are taken together until gradients or operands of their factors take
            this much, and one layer at least: so launches are few and memory is bounded.
    """

    def __init__(self, chunk_bytes: int = _CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._kernels: Kernels | None = None

    def layer(self, group: dict[str, Any], states: States) -> FusedLayer:
        """Return a routed layer of the folded form."""
        return FusedLayer(group, states)

    def take(
        self,
        layers: Sequence[RoutedLayer],
        rest: Sequence[DenseTensor],
        tally: UpdateTally | None = None,
        required: Mapping[str, Tensor] | None = None,
    ) -> Outcome:
        """Step all routed layers and the tensors that are not routed; all of them have gradients.

        The host waits for the device once. Arguments and result are those of
        `molf.core.step.take_step`; layers are those of `layer`.

        Raises:
            RuntimeError: The scores of a layer are not finite, because its moments were not; no
                weight has moved.
            ValueError: A parameter or gradient is not what the kernels can have; nothing was
                written.
        """
        fused = [layer for layer in layers if isinstance(layer, FusedLayer)]
        assert len(fused) == len(layers), "layers are made by FusedStep.layer"
        # Weights come first: the gradients of a layer's factors follow from that of its weight.
        tensors = [layer.dense[0] for layer in fused]
        tensors += [bias for layer in fused for bias in layer.dense[1:]] + list(rest)
        if not tensors:
            return Outcome({}, [])
        home = tensors[0].parameter.device
        for tensor in tensors:
            check_kernel_parameter(tensor.parameter, tensor.stored.name, home)
        kernels = self._on(home)
        with full_precision([home.type]):
            gradients = [gradient(tensor.parameter) for tensor in tensors]
            required = required or {}
            further = [bound_of(number).to(home).view(1) for number in required.values()]
            bounds = torch.cat([_bounds(kernels, gradients, fused), *further])
            finite = may_happen(bounds)
            totals, owners = self._move_moments(kernels, fused, finite)
            on_host = torch.cat([bounds, *totals]).tolist()

            if not all(map(fits, on_host[: len(bounds)])):
                parameters = [tensor.parameter for tensor in tensors]
                return refused(parameters, required, on_host[: len(bounds)])
            sums = [[0.0] * len(layer.experts) for layer in fused]
            for (number, expert), total in zip(owners, on_host[len(bounds) :], strict=True):
                sums[number][expert] += total
            decisions = [layer.decide(own) for layer, own in zip(fused, sums, strict=True)]
            winners = [won for won, _ in decisions]
            self._move_weights(kernels, fused, winners, rest, finite, tally)
        names = [layer.name for layer in fused]
        return Outcome(dict(zip(names, [x for _, x in decisions], strict=True)), [])

    def _on(self, device: torch.device) -> Kernels:
        if self._kernels is None or self._kernels.device != device:
            self._kernels = Kernels(device)
        return self._kernels

    def _move_moments(
        self, kernels: Kernels, layers: Sequence[FusedLayer], finite: Tensor
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Move the moments of all experts; return sums on the device, and (layer, expert) of each.

        Dense tensors are moved together. Gradients of factors are made for some layers at a time.
        """
        totals: list[Tensor] = []
        owners: list[tuple[int, int]] = []
        part = 0

        def move(items: list[Moments], score: str) -> None:
            nonlocal part
            totals.append(kernels.moments(items, finite, score, part=part))
            part += 1

        for score in ("epd", "pfn"):  # controls are scored by EPD
            scored = [
                (number, layer)
                for number, layer in enumerate(layers)
                if (layer.group["score"] == "pfn") == (score == "pfn")
            ]
            if not scored:
                continue
            move([item for _, layer in scored for item in layer.dense_moments()], score)
            owners += [(number, 0) for number, layer in scored for _ in layer.dense]
            for chunk in _chunks(scored, lambda entry: entry[1].factor_bytes, self._chunk_bytes):
                items: list[Moments] = []
                for number, layer in chunk:
                    found = layer.factor_moments()
                    # A and B of expert 1, of expert 2, ...
                    owners += [(number, 1 + place // 2) for place in range(len(found))]
                    items += found
                move(items, score)
        return totals, owners

    def _move_weights(
        self,
        kernels: Kernels,
        layers: Sequence[FusedLayer],
        winners: Sequence[tuple[int, ...]],
        rest: Sequence[DenseTensor],
        finite: Tensor,
        tally: UpdateTally | None,
    ) -> None:
        """Count the step for every expert and give the winners and the rest theirs."""
        late: list[Move] = []  # what needs no operands can wait for all others
        pairs = list(zip(layers, winners, strict=True))
        chunks = _chunks(pairs, lambda pair: pair[0].operand_bytes(pair[1]), self._chunk_bytes)
        for part, chunk in enumerate(chunks):
            pending = _Pending([], [])
            for layer, won in chunk:
                layer.count_step()
                moves, factors = layer.moves(won)
                late += [move for move in moves if move.product is None]
                pending.moves.extend(move for move in moves if move.product is not None)
                pending.factors.extend(factors)
            kernels.factors(pending.factors, finite, part=part)
            _write(kernels, pending.moves, finite, tally, part)
        for tensor in rest:
            tensor.state["step"] += 1
            late.append(Move(tensor, tensor.adamw_step(), has_moved_moments=False))
        _write(kernels, late, finite, tally)


def _bounds(kernels: Kernels, gradients: Sequence[Tensor], layers: Sequence[FusedLayer]) -> Tensor:
    """The bounds of `FiniteGuard` for float32; the first gradients are the layers'."""
    factors = [factor for layer in layers for factor in layer.factors]
    norms = kernels.squares([*gradients, *factors]).sqrt()
    bounds = norms[: len(gradients)] / largest_norm(torch.float32)
    if layers:
        scalings = torch.tensor(
            [layer.largest_scaling for layer in layers], dtype=torch.float64, device="cpu"
        )
        gains = norms[len(gradients) :].view(-1, 2).amax(1) * upload(scalings, bounds.device)
        bounds[: len(layers)] *= gains.clamp(min=1)
    return bounds


def _write(
    kernels: Kernels,
    moves: Sequence[Move],
    finite: Tensor,
    tally: UpdateTally | None,
    part: int = 0,
) -> None:
    """Write weights; where it is asked, measure what rounding has lost."""
    items = [move.item() for move in moves]
    probes = [] if tally is None else [_Probe(move) for move in moves]
    products = [item for item in items if isinstance(item, LowRank)]
    kernels.low_rank(products, finite, part=part)
    kernels.adamw([item for item in items if isinstance(item, AdamW)], finite)
    # Autograd does not see the kernels write, and must not go backward through what was before.
    torch.autograd.graph.increment_version([move.tensor.parameter for move in moves])
    for probe in probes:
        probe.compare(tally)


class _Probe:
    """Some rows of a weight before the step, to be compared with what is stored after it."""

    def __init__(self, move: Move) -> None:
        parameter = move.tensor.parameter
        self._move = move
        self._rows = UpdateTally.sample(parameter)
        self._before = self._read().clone()

    def compare(self, tally: UpdateTally | None) -> None:
        """Count the same step in float64 beside what has arrived."""
        assert tally is not None
        move, before = self._move, self._before
        intended = before * (1.0 if move.step is None else move.step.kept)
        if move.product is not None:
            left, right = move.product
            intended += left[self._rows].to(before.dtype) @ right.to(before.dtype)
        if move.step is not None:
            state = move.tensor.state
            moments = (state[key][self._rows].to(before.dtype) for key in ("exp_avg", "exp_avg_sq"))
            move.step.descend_(intended, *moments)
        weight = tally.weight(move.tensor.parameter)
        tally.add(before, intended, self._read(), weight=weight)

    def _read(self) -> Tensor:
        values = self._move.tensor.stored.read(self._rows)
        return values.to(sum_dtype(values.device))


def _chunks(entries: Iterable[_T], size: Callable[[_T], int], limit: int) -> Iterator[list[_T]]:
    """Yield runs of entries whose sizes add up to no more than `limit`, or of a single one."""
    chunk: list[_T] = []
    total = 0
    for entry in entries:
        total += size(entry)
        if chunk and total > limit:
            yield chunk
            chunk, total = [], size(entry)
        chunk.append(entry)
    if chunk:
        yield chunk
