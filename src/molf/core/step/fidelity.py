"""Measurement, on a sample, of the updates that rounding loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core.arithmetic.adam import AdamWStep, sum_dtype
from molf.core.arithmetic.blocks import Rows
from molf.core.arithmetic.weight_step import Product, apply_step
from molf.core.storage.collectives import Processes
from molf.core.storage.place import WHOLE, Place

_SAMPLE = 65_536  # numbers of a tensor, in rows spread over it


class UpdateFidelity(NamedTuple):
    """Measured losses of one step.

    Attributes:
        lost: Share of the elements with a non-zero update whose stored value did not change.
        kept: Movement of the stored values along the updates, divided by the updates; 1 on average
            with unbiased rounding.
    """

    lost: float
    kept: float


def _every(tensor: Tensor, place: Place) -> int:
    """Return n: every n-th row of the whole tensor is in the sample."""
    return max(1, min(place.rows(tensor), place.count(tensor) // _SAMPLE))


class UpdateTally:
    """Counts intended and stored updates, on the devices.

    Updates of a sample of rows are computed again in float64, so that losses of the float32
    arithmetic count too. Every tensor counts with all its elements.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # [moved, lost, along, squared] each

    @staticmethod
    def sample(tensor: Tensor, rows: Rows = ..., place: Place = WHOLE) -> Rows:
        """Return the sampled rows of a block.

        Args:
            tensor: The tensor, or this process's rows of it.
            rows: Rows of the block; default: all.
            place: Location in the whole tensor.

        Returns:
            Indices within the block, possibly none.
        """
        # Every n-th row of the whole tensor, so that the block size does not change the sample.
        if tensor.dim() == 0:
            return ...
        start = place.first_row(tensor) + (0 if rows is ... else rows.start)
        every = _every(tensor, place)
        return slice(-start % every, None, every)

    @staticmethod
    def weight(tensor: Tensor, place: Place = WHOLE) -> float:
        """Return the number of elements that one sampled element represents."""
        rows = place.rows(tensor)
        if tensor.dim() == 0 or not rows:
            return 1.0
        return rows / -(-rows // _every(tensor, place))

    def add(self, before: Tensor, intended: Tensor, after: Tensor, *, weight: float = 1.0) -> None:
        """Count one sample.

        Args:
            before: Values before the step, float64.
            intended: Values after the step in float64.
            after: Stored values after the step, as float64.
            weight: Number of elements that one sampled element represents.
        """
        update, movement = intended - before, after - before
        is_update = update != 0
        sums = (
            is_update.sum(),
            (is_update & (movement == 0)).sum(),
            (movement * update).sum(),
            update.square().sum(),
        )
        self._sums.append(torch.stack([s.to(sum_dtype(before.device)) for s in sums]).mul_(weight))

    def add_up(self, processes: Processes, device: torch.device) -> None:
        """Sum the counts of all processes; every one of them must call it at the end of a step.

        Args:
            processes: Processes that share the tensors.
            device: Device of the sum.
        """
        if not processes.is_one:
            self._sums = [processes.sum(self._total(device))]

    def result(self) -> UpdateFidelity | None:
        """Return the counts; None if no update was non-zero. The host waits for the device."""
        if not self._sums:
            return None
        moved, lost, along, squared = self._total(self._sums[0].device).tolist()
        return UpdateFidelity(lost / moved, along / squared) if moved and squared else None

    def _total(self, home: torch.device) -> Tensor:
        """Return the sums of all samples, [4]."""
        sums = self._sums or [torch.zeros(4, dtype=sum_dtype(home))]
        return torch.stack([s.to(home) for s in sums]).sum(0)


class Sample:
    """Sampled values of a tensor before a step, and a float64 copy that takes the same step.

    Args:
        values: Values before the step; copied.
    """

    def __init__(self, values: Tensor) -> None:
        self._wide = sum_dtype(values.device)
        self._before = values.to(self._wide, copy=True)
        self._intended = self._before.clone()

    def intend(
        self,
        moments: Sequence[Tensor],
        step: AdamWStep | None,
        product: Product | None = None,
        *,
        index: Any = ...,
        transposed: bool = False,
        scale: float = 1.0,
    ) -> None:
        """Take the step on the float64 copy; arguments as in `apply_step`, for `index` of it."""
        apply_step(
            self._intended[index],
            [moment.to(self._wide) for moment in moments],
            step,
            product and product.to(self._wide),
            transposed=transposed,
            scale=scale,
        )

    def compare(self, after: Tensor, tally: UpdateTally, *, weight: float = 1.0) -> None:
        """Count the stored values after the step."""
        tally.add(self._before, self._intended, after.to(self._wide), weight=weight)
