"""The options of `molf generate` and `molf chat`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from molf.errors import InputError

DTYPES = ("float32", "bfloat16", "float16")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How answers are generated."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0: always the most likely token; above 0: draw, more evenly at higher values."""
    top_p: float = 1.0
    """With a temperature, draw from the likeliest tokens that have this share together."""
    seed: int = 42
    """Seed of the draws."""
    dtype: Annotated[str, Parameter(choices=DTYPES)] = "float32"
    """Type that the weights are loaded in."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One is out of its range.
        """
        for name, is_allowed, allowed in (
            ("max_new_tokens", self.max_new_tokens > 0, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32"),
        ):
            if not is_allowed:
                raise InputError(f"Invalid {name}={getattr(self, name):g}. Must be {allowed}.")
        if self.top_p < 1 and not self.temperature:
            raise InputError(
                "top_p has no effect at temperature 0. Give a temperature, or leave it out."
            )
