"""All collectives of a step on shards; in one process each of them does nothing.

Every process calls the same collectives in the same order: each branch that calls or skips one
follows from the structure of the model or from numbers that `sum` has returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


class Cut(NamedTuple):
    """A matrix, or this process's part of it along one dimension.

    Attributes:
        values: Two dimensions; the whole matrix, or the part.
        dim: Dimension that is cut, 0 or 1.
        size: Size of that dimension in the whole matrix.
    """

    values: Tensor
    dim: int
    size: int

    @property
    def other(self) -> int:
        """Size of the dimension that is not cut."""
        return self.values.shape[1 - self.dim]


class Processes:
    """One process, which has whole tensors.

    Attributes:
        count: Number of shards of a tensor.
        is_one: Whether tensors are whole.
    """

    count = 1
    is_one = True

    def part(self, size: int) -> slice:
        """Return the indices of this process along a dimension that is cut."""
        return slice(0, size)

    def sum(self, numbers: Tensor) -> Tensor:
        """Return sums over whole tensors, [n], from sums over this process's parts, [n]."""
        return numbers

    def gather(self, parts: Sequence[Cut]) -> list[Tensor]:
        """Return the whole matrices, from this process's parts."""
        return [one.values for one in parts]

    def sum_and_cut(self, partial: Sequence[Cut]) -> list[Tensor]:
        """Return this process's part of the sums over all shards, from whole matrices."""
        return [one.values for one in partial]


ALONE = Processes()


class Shards(Processes):
    """Processes that each have a part of every tensor, as `fully_shard` cuts rows.

    A dimension of n elements is cut into parts of ceil(n / count); the last ones may be shorter or
    empty. Other dimensions of the mesh have replicas.

    Args:
        mesh: `DeviceMesh` of all processes.
        dim: Dimension of the mesh along which tensors are cut.
    """

    is_one = False

    def __init__(self, mesh: Any, dim: int) -> None:
        self.count = mesh.size(dim)
        self._rank = mesh.get_local_rank(dim)
        self._group = mesh.get_group(dim)
        self._replicas = mesh.size() // self.count
        # Sums of all replicas: the winners are those of all processes, even if the reductions of
        # two replicas round differently.
        self._everyone = self._group if self._replicas == 1 else dist.group.WORLD
        # Parameters may be in host memory (CPUOffloadPolicy) while the group communicates on a GPU.
        self._device_type = mesh.device_type

    def _length(self, size: int) -> int:
        """Return the length of the longest part."""
        return -(-size // self.count)

    def part(self, size: int) -> slice:
        """Return the indices of this process along a dimension that is cut; may be empty."""
        length = self._length(size)
        start = min(self._rank * length, size)
        return slice(start, min(start + length, size))

    def sum(self, numbers: Tensor) -> Tensor:
        """Sum by one all-reduce over all processes."""
        total = numbers.to(self._device_type, copy=True)
        dist.all_reduce(total, group=self._everyone)
        return total.div_(self._replicas).to(numbers.device)

    def gather(self, parts: Sequence[Cut]) -> list[Tensor]:
        """Gather all parts by one all-gather."""
        flat = torch.cat([_padded(one, self._length(one.size)).reshape(-1) for one in parts])
        sent = flat.to(self._device_type)
        found = sent.new_empty(self.count * len(sent))
        dist.all_gather_into_tensor(found, sent, group=self._group)
        pieces = found.to(flat.device).view(self.count, -1)
        pieces = pieces.split([self._length(one.size) * one.other for one in parts], 1)
        return [
            piece.reshape(-1, one.other)[: one.size].movedim(0, one.dim)
            for piece, one in zip(pieces, parts, strict=True)
        ]

    def sum_and_cut(self, partial: Sequence[Cut]) -> list[Tensor]:
        """Sum and cut all matrices by one reduce-scatter."""
        lengths = [self._length(one.size) for one in partial]
        pairs = list(zip(partial, lengths, strict=True))
        rows = [_padded(one, self.count * length).view(self.count, -1) for one, length in pairs]
        flat = torch.cat(rows, 1)
        sent = flat.to(self._device_type)
        found = sent.new_empty(sent.shape[1])
        dist.reduce_scatter_tensor(found, sent.view(-1), group=self._group)
        pieces = found.to(flat.device).split([length * one.other for one, length in pairs])
        own = [self.part(one.size) for one in partial]
        return [
            piece.view(-1, one.other)[: rows.stop - rows.start].movedim(0, one.dim)
            for piece, one, rows in zip(pieces, partial, own, strict=True)
        ]


def _padded(one: Cut, length: int) -> Tensor:
    """Return the matrix with the cut dimension first, with zeros up to `length`; contiguous."""
    rows = one.values.movedim(one.dim, 0)
    return pad(rows, (0, 0, 0, length - len(rows))).contiguous()
