"""Executor with torch operations, in blocks of rows; float32 on a CPU in one pass each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from molf.core.arithmetic import one_pass
from molf.core.arithmetic.adam import (
    MomentDecay,
    gradient,
    sum_dtype,
    update_and_score,
)
from molf.core.arithmetic.blocks import BLOCKS, Blocks, Rows
from molf.core.arithmetic.devices import CanRead, is_host_memory
from molf.core.arithmetic.weight_step import apply_step
from molf.core.scores.rules import Winners
from molf.core.step.dense import DenseTensor
from molf.core.step.exchange import buckets, factor_gradients, with_whole_operands
from molf.core.step.executor import Executor, Owner, ScoreSums
from molf.core.step.fidelity import Sample, UpdateTally
from molf.core.step.guard import FiniteGuard
from molf.core.step.layer import RoutedLayer
from molf.core.step.operations import (
    AdapterWrite,
    FactorWrite,
    Operand,
    TensorWrite,
)

# Fewest elements of a weight in one product: smaller products are slow.
_PRODUCT_ELEMENTS = 1 << 20
# Rows in one product if blocks are float32 copies: more rows take more memory.
_PRODUCT_ROWS_OF_COPIES = 128


class Eager(Executor):
    """Runs operations with torch, layer by layer.

    Args:
        blocks: Sizes of blocks.
        can_read: Whether the host reads a tensor on a device without waiting.
    """

    def __init__(self, blocks: Blocks = BLOCKS, can_read: CanRead = is_host_memory) -> None:
        super().__init__(can_read)
        self.blocks = blocks

    def check(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Accept all parameters."""

    def squares(self, tensors: Iterable[tuple[Tensor, torch.dtype]]) -> Tensor:
        """Sum the squares of each tensor, one tensor at a time."""
        found: list[Tensor] = []
        for tensor, dtype in tensors:
            one = self._squares(tensor, dtype)
            home = found[0].device if found else one.device
            found.append(one.to(home, sum_dtype(home)))
        return torch.stack(found)

    def _squares(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous():
            flat = tensor.view(-1)  # dot is twice as fast as vector_norm
            return torch.dot(flat, flat)
        if tensor.dtype == dtype:
            return torch.linalg.vector_norm(tensor).square()
        # In blocks: vector_norm copies its input to the other dtype.
        parts = [
            torch.linalg.vector_norm(tensor[rows], dtype=dtype).square()
            for rows in self.blocks.of(tensor)
        ]
        return torch.stack(parts).sum() if parts else tensor.new_zeros((), dtype=dtype)

    def update_moments(self, layers: Sequence[RoutedLayer], guard: FiniteGuard) -> ScoreSums:
        """Update moments layer by layer."""
        numbers: list[Tensor] = []
        owners: list[Owner] = []
        number = 0
        for bucket in buckets(layers):
            for index, expert, part, sums in self._update_bucket(bucket, guard):
                numbers += sums
                terms = bucket[index].score.terms
                owners += [Owner(number + index, expert, part, term.name) for term in terms]
            number += len(bucket)
        home = guard.bounds.device
        if not numbers:  # all shards of this process are empty
            return ScoreSums(guard.bounds.new_zeros(0), owners)
        return ScoreSums(torch.stack([one.to(home) for one in numbers]), owners)

    def _update_bucket(
        self, bucket: Sequence[RoutedLayer], guard: FiniteGuard
    ) -> Iterator[tuple[int, int, int, list[Tensor]]]:
        """Yield index of the layer, and the sums as `_update_layer` does."""
        # A function, so that the gradients of one bucket exist at a time.
        grads = factor_gradients(bucket, self.blocks)
        for index, layer in enumerate(bucket):
            for expert, part, sums in self._update_layer(layer, grads[index], guard):
                yield index, expert, part, sums

    def _update_layer(
        self, layer: RoutedLayer, grads: tuple[Tensor, Tensor], guard: FiniteGuard
    ) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Yield expert, part and partial sums of every term, 0-dim each, for every block."""
        ranks, terms = list(layer.group["ranks"]), layer.score.terms
        for part, tensor in enumerate(layer.dense):
            decay, grad = _decay_of(tensor, guard), gradient(tensor.parameter)
            moments = tensor.moments
            for rows in moments.blocks(self.blocks):
                yield 0, part, moments.advance(rows, grad[rows], decay, terms)
        first = int(layer.has_full)
        (grad_A, grad_B), (of_A, of_B) = grads, layer.factor_moments()
        decay = guard.decay_of(grad_A.device, of_A[0].dtype, layer.group["betas"])
        for index in range(len(ranks)):
            own = _block(layer.rows_of(index), grad_A, *of_A)
            for rows in self.blocks.cached(own[0]):
                yield first + index, 0, update_and_score(*_block(rows, *own), decay, terms)
        # Columns of one expert are not contiguous in memory: update the columns of all together.
        for rows in self.blocks.cached(grad_B):
            block = _block(rows, grad_B, *of_B)
            if len(ranks) == 1:
                yield first, 1, update_and_score(*block, decay, terms)
                continue
            sums = update_and_score(*block, decay, terms, by_column=True)
            columns = [one.split(ranks) for one in sums]
            for index, own_columns in enumerate(zip(*columns, strict=True)):
                yield first + index, 1, [sums.sum() for sums in own_columns]

    def write(
        self,
        layers: Iterable[tuple[RoutedLayer, Winners]],
        plain: Sequence[DenseTensor],
        guard: FiniteGuard,
        tally: UpdateTally | None,
    ) -> None:
        """Write layer by layer."""
        won = dict(layers)
        for bucket in buckets(list(won)):
            self._write_bucket(bucket, won, guard, tally)
        for tensor in plain:
            self._step_plain(tensor, _decay_of(tensor, guard), tally)

    def _write_bucket(
        self,
        bucket: Sequence[RoutedLayer],
        won: Mapping[RoutedLayer, Winners],
        guard: FiniteGuard,
        tally: UpdateTally | None,
    ) -> None:
        """Write the winners of the layers of a bucket."""
        # A function, so that the operands, which `writes` allocates, are freed on return: those of
        # one bucket exist at a time.
        listed = [layer.writes(won[layer]) for layer in bucket]
        for writes in listed:
            for factor in writes.factors:
                self._write_factor(factor)
        for writes in with_whole_operands(bucket, listed):
            for write in writes.tensors:
                self._write_tensor(write, _decay_of(write.tensor, guard), tally)
            for adapter in writes.adapters:
                self._write_adapter(adapter, tally)

    def _step_plain(
        self, tensor: DenseTensor, decay: MomentDecay, tally: UpdateTally | None
    ) -> None:
        """Update moments, counter and values of a plain tensor."""
        tensor.state["step"] += 1
        step = tensor.adamw_step()
        if tally is None and decay.is_known_finite and tensor.is_plain:
            tensors = tensor.stored.read(), gradient(tensor.parameter), *tensor.moments.load(...)
            if one_pass.fits(*tensors):
                one_pass.adamw(*tensors, **asdict(step))
                return
        self._write_tensor(TensorWrite(tensor, step), decay, tally, advanced=False)

    def _write_factor(self, write: FactorWrite) -> None:
        increment = write.step.increment(
            write.values, write.exp_avg, write.exp_avg_sq, blocks=self.blocks
        )
        # Operands first: they need P before the step.
        for operand in write.operands:
            _fill(operand, write.values, increment)
        write.values.add_(increment)

    def _write_tensor(
        self,
        write: TensorWrite,
        decay: MomentDecay,
        tally: UpdateTally | None,
        *,
        advanced: bool = True,
    ) -> None:
        """Write in blocks of rows.

        Args:
            write: The write.
            decay: Scalars of the moments' update.
            tally: Measures updates lost to rounding, if given.
            advanced: Whether `update_moments` has run for the tensor in this step.
        """
        tensor, step, product, transposed = write
        moments, stored = tensor.moments, tensor.stored
        moves = step is not None or product is not None
        if not moves and moments.is_settled:
            return
        parameter, grad = tensor.values, gradient(tensor.parameter)
        at_least = 1 if product is None else _product_rows(tensor)
        for rows in self.blocks.of(parameter, at_least=at_least, multiple=moments.multiple):
            moved = moments.settle(rows, grad[rows], decay, advanced=advanced)
            if not moves:
                continue
            part = product and product.rows(rows, transposed=transposed)
            values = stored.read(rows)
            if tally is not None:
                picked = tally.sample(parameter, rows, tensor.place)
                sample = Sample(values[picked])
                picked_part = part and part.rows(picked, transposed=transposed)
                sample.intend(
                    [moment[picked] for moment in moved], step, picked_part, transposed=transposed
                )
            apply_step(values, moved, step, part, transposed=transposed, blocks=self.blocks)
            stored.write(rows, values)
            if tally is not None:
                after = stored.read(rows)[picked]
                sample.compare(after, tally, weight=tally.weight(parameter, tensor.place))

    def _write_adapter(self, write: AdapterWrite, tally: UpdateTally | None) -> None:
        values = write.stored.read()
        sample = None if tally is None else Sample(values)
        for one in write.slices:
            moments = one.exp_avg, one.exp_avg_sq
            if sample is not None:
                sample.intend(moments, one.step, index=one.where, scale=one.scale)
            apply_step(values[one.where], moments, one.step, scale=one.scale, blocks=self.blocks)
        write.stored.write(..., values)
        if sample is not None:
            assert tally is not None, "samples are taken for a tally"
            sample.compare(write.stored.read(), tally)


def _block(
    rows: Rows, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return grad[rows], exp_avg[rows], exp_avg_sq[rows]


def _decay_of(tensor: DenseTensor, guard: FiniteGuard) -> MomentDecay:
    return guard.decay_of(tensor.parameter.device, tensor.moments.dtype, tensor.group["betas"])


def _fill(operand: Operand, old: Tensor, increment: Tensor) -> None:
    """Write `old P + increment dP`; a coefficient of 0 or 1 adds no rounding."""
    if operand.increment == 0:
        torch.mul(old, operand.old, out=operand.values)
    elif operand.old == 0:
        torch.mul(increment, operand.increment, out=operand.values)
    elif operand.old == operand.increment == 1:
        torch.add(old, increment, out=operand.values)
    else:
        torch.mul(old, operand.old, out=operand.values).add_(increment, alpha=operand.increment)


def _product_rows(tensor: DenseTensor) -> int:
    """Return the fewest rows of a block that a product is added to."""
    if tensor.is_plain:
        return -(-_PRODUCT_ELEMENTS // max(1, tensor.parameter.shape[-1]))
    return _PRODUCT_ROWS_OF_COPIES
