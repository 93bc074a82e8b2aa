"""Measure the share of a training's update that a saved checkpoint holds, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class SavedUpdate:
    """Sums over the update (trained numbers minus initial ones) and the stored update.

    Attributes:
        numbers: Count of compared numbers.
        moved: Count of numbers changed by training.
        kept: Count of these whose stored value differs from the initial one.
        update_square: Squared norm of the update.
        error_square: Squared norm of (stored numbers - trained numbers).
        along: Scalar product of the stored update with the update.
    """

    numbers: int = 0
    moved: int = 0
    kept: int = 0
    update_square: float = 0.0
    error_square: float = 0.0
    along: float = 0.0

    def add(self, start: Tensor, trained: Tensor, saved: Tensor, moved: Tensor) -> None:
        """Add numbers to the sums; all arguments have the same shape.

        Args:
            start: Initial numbers, float32.
            trained: Trained numbers, float32.
            saved: Stored numbers, of any type; `trained` itself if they are stored exactly.
            moved: Mask of the numbers changed by training; they differ from `start`.
        """
        self.numbers += trained.numel()
        count = int(moved.count_nonzero())
        self.moved += count
        zero = torch.zeros((), dtype=torch.float32, device=trained.device)
        update = torch.where(moved, trained - start, zero)
        square = float(update.double().square().sum())
        self.update_square += square
        if saved is trained:  # nothing was rounded: the sums below have the same results
            self.kept += count
            self.along += square
            return
        stored = saved.to(torch.float32)
        self.kept += int((moved & (stored != start)).count_nonzero())
        error = torch.where(moved, stored - trained, zero)
        self.error_square += float(error.double().square().sum())
        self.along += float((update.double() * (update + error).double()).sum())

    def record(self) -> dict[str, Any]:
        """Return the figures for a run's `config.yaml`.

        Returns:
            `numbers`; `moved_share`, the share of them changed by training; `kept_share`, whose
            stored value differs from the initial one; `update_kept`, the projection of the stored
            update on the update as a share of it (1 if all is stored exactly; with stochastic
            rounding 1 on average); `update_error`, relative to the update by Frobenius norms.
        """
        numbers, square = max(self.numbers, 1), self.update_square
        return {
            "numbers": self.numbers,
            "moved_share": self.moved / numbers,
            "kept_share": self.kept / numbers,
            "update_kept": self.along / square if square else 1.0,
            "update_error": (self.error_square / square) ** 0.5 if square else 0.0,
        }
