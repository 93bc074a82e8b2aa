"""How much of the updates arrives in the weights: what rounding loses, measured on a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molf.core.adam import AdamWStep, sum_dtype
from molf.core.blocks import Rows
from molf.core.weight_step import Product, apply_step

_SAMPLE = 65_536  # numbers of a tensor, in rows spread over it


class UpdateFidelity(NamedTuple):
    """What became of one step's updates.

    Attributes:
        lost: Share of the elements with an update that is not zero whose stored value stayed the
            same.
        kept: Movement of the stored values along the updates, as a share of the updates: 1 where
            nothing is lost on average, as with unbiased rounding.
    """

    lost: float
    kept: float


def _every(tensor: Tensor) -> int:
    """Every how many rows one is looked at."""
    return max(1, min(len(tensor), tensor.numel() // _SAMPLE))


class UpdateTally:
    """Counts, on the devices, what was meant to move and what has moved.

    Updates are computed a second time for a sample of rows, from the same state in float64, so that
    losses of float32 arithmetic itself show as well. Every tensor counts with all its elements.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # [moved, lost, along, squared] each

    @staticmethod
    def sample(tensor: Tensor, rows: Rows = ...) -> Rows:
        """Which rows of a block of a tensor are looked at.

        They are every n-th of the whole tensor, so blocks do not change which.

        Args:
            tensor: The tensor.
            rows: The block; all of it, if not given.

        Returns:
            Indices within the block; there may be none.
        """
        if tensor.dim() == 0:
            return ...
        start = 0 if rows is ... else rows.start
        return slice(-start % _every(tensor), None, _every(tensor))

    @staticmethod
    def weight(tensor: Tensor) -> float:
        """How many elements each of the sample's stands for."""
        if tensor.dim() == 0 or not len(tensor):
            return 1.0
        return len(tensor) / -(-len(tensor) // _every(tensor))

    def add(self, before: Tensor, intended: Tensor, after: Tensor, *, weight: float = 1.0) -> None:
        """Count a sample's values before the step, after an exact one, and as they are stored.

        Args:
            before: float64.
            intended: float64.
            after: float64.
            weight: How many elements each of the sample's stands for.
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

    def result(self) -> UpdateFidelity | None:
        """Read the counts; None where nothing was to move. The host waits for the device."""
        if not self._sums:
            return None
        home = self._sums[0].device
        moved, lost, along, squared = torch.stack([s.to(home) for s in self._sums]).sum(0).tolist()
        return UpdateFidelity(lost / moved, along / squared) if moved and squared else None


class Sample:
    """Some values of a tensor before a step; the same step is taken on a float64 copy of them.

    Args:
        values: As they are stored before the step; copied.
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
        """Take the step; arguments are those of `apply_step`, and the part that they are for."""
        apply_step(
            self._intended[index],
            [moment.to(self._wide) for moment in moments],
            step,
            product and product.to(self._wide),
            transposed=transposed,
            scale=scale,
        )

    def compare(self, after: Tensor, tally: UpdateTally, *, weight: float = 1.0) -> None:
        """Count the values as they are stored after the step."""
        tally.add(self._before, self._intended, after.to(self._wide), weight=weight)
