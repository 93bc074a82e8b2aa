"""How much of the updates arrives in the weights: what rounding loses, measured on a sample."""

from __future__ import annotations

from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from molf.core.adam import sum_dtype

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


class UpdateTally:
    """Counts, on the devices, what was meant to move and what has moved.

    Updates are computed a second time for a sample of rows, from the same state in float64, so that
    losses of float32 arithmetic itself show as well. Every tensor counts with all its elements.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # [moved, lost, along, squared] each

    @staticmethod
    def sample(tensor: Tensor) -> slice | EllipsisType:
        """Rows of any block of a tensor that are looked at."""
        if tensor.dim() == 0:
            return ...
        return slice(None, None, max(1, tensor.numel() // _SAMPLE))

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
