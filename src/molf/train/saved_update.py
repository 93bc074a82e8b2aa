"""How much of a training a saved checkpoint holds, counted tensor by tensor while it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class SavedUpdate:
    """What became of the update, which is the trained numbers less those training began with.

    Attributes:
        numbers: Numbers that were compared.
        moved: How many of them training changed.
        kept: How many of these are stored with another value than before the training.
        update_square: Squared norm of the update.
        error_square: Squared norm of the difference of the stored numbers from the trained ones.
        along: Scalar product of the stored update with the update.
    """

    numbers: int = 0
    moved: int = 0
    kept: int = 0
    update_square: float = 0.0
    error_square: float = 0.0
    along: float = 0.0

    def add(self, start: Tensor, trained: Tensor, saved: Tensor, moved: Tensor) -> None:
        """Count some numbers.

        Args:
            start: What training began with, float32.
            trained: What it ended with, float32.
            saved: What is stored, of any type.
            moved: Which of them training changed.
        """
        stored = saved.to(torch.float32)
        self.numbers += trained.numel()
        self.moved += int(moved.sum())
        self.kept += int((moved & (stored != start)).sum())
        zero = torch.zeros((), dtype=torch.float32, device=trained.device)
        update = torch.where(moved, trained - start, zero)
        error = torch.where(moved, stored - trained, zero)
        self.update_square += float(update.double().square().sum())
        self.error_square += float(error.double().square().sum())
        self.along += float((update.double() * (update + error).double()).sum())

    @property
    def moved_share(self) -> float:
        """Share of the numbers that training changed."""
        return self.moved / self.numbers if self.numbers else 0.0

    @property
    def kept_share(self) -> float:
        """Share of the numbers that are stored with another value than before the training."""
        return self.kept / self.numbers if self.numbers else 0.0

    @property
    def error(self) -> float:
        """Error of the stored update relative to the update, by Frobenius norms."""
        return (self.error_square / self.update_square) ** 0.5 if self.update_square else 0.0

    @property
    def update_kept(self) -> float:
        """How far the stored numbers moved along the update, as a share of the update.

        It is 1 where all is stored. Stochastic rounding keeps 1 on average, whatever its error.
        """
        return self.along / self.update_square if self.update_square else 1.0

    def record(self) -> dict[str, Any]:
        """Return the figures for a run's `config.yaml`."""
        return {
            "numbers": self.numbers,
            "moved_share": self.moved_share,
            "kept_share": self.kept_share,
            "update_kept": self.update_kept,
            "update_error": self.error,
        }
