"""Settings of an evaluation, shared by all tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from molf.errors import InputError

Progress = Callable[[str, int, int], None]
"""Called after each batch with the name of the measurement, the number done and the total."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings of an evaluation.

    Attributes:
        batch_size: Sequences per forward pass. A batch that does not fit in memory is halved.
        max_length: Longest text in tokens, prompt and answer together; longer ones are left out
            and counted. The model's own maximum applies as well.
        max_new_tokens: Most tokens generated for one answer; None for a limit from the longest
            expected answer.
        seed: Seed of the bootstrap intervals.
        split_special_tokens: Whether control tokens in the records are read as plain text.
    """

    batch_size: int = 16
    max_length: int = 1024
    max_new_tokens: int | None = None
    seed: int = 0
    split_special_tokens: bool = False

    @classmethod
    def of(cls, options: Any) -> EvaluationSettings:
        """Return the settings from the options of `molf train` or `molf eval`."""
        return cls(
            batch_size=options.per_device_eval_batch_size,
            max_length=options.max_length,
            seed=options.seed,
            split_special_tokens=options.split_special_tokens,
        )

    def __post_init__(self) -> None:
        minima = {"batch_size": 1, "max_length": 2, "max_new_tokens": 1}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise InputError(f"Invalid {name}={value}. Must be at least {minimum}.")
