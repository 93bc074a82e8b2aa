"""Ranges of numeric options: annotations beside the type of each option."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

from molf.errors import InputError

MOST_COUNTED = 2**31  # of examples, tokens or ranks, which tensors of them would have as a size


class Range(NamedTuple):
    """A range of an option's numbers.

    Attributes:
        allows: Whether a number is inside.
        text: The range in words.
    """

    allows: Callable[[float], bool]
    text: str


POSITIVE = Range(lambda value: 0 < value < math.inf, "finite and greater than 0")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "finite and at least 0")
BELOW_2_31 = Range(lambda value: value < MOST_COUNTED, "below 2**31")
SHARE = Range(lambda value: 0 <= value < 1, "in [0, 1)")
BELOW_2_32 = Range(lambda value: value < 2**32, "below 2**32")  # the limit of numpy's generators


def check_ranges(options: Any) -> None:
    """Check the numbers of a dataclass of options; None stands for the default.

    Raises:
        InputError: A number is out of its range.
    """
    for name, ranges in _ranges(options.__class__).items():
        value = getattr(options, name)
        for one in ranges:
            if value is not None and not one.allows(value):
                raise InputError(f"Invalid {name}={value}. Must be {one.text}.")


@cache
def _ranges(options: type[Any]) -> dict[str, list[Range]]:
    """Return the ranges of each option of a dataclass, from its annotations."""
    hints: dict[str, Any] = get_type_hints(options, include_extras=True)
    return {
        name: [entry for entry in get_args(hint) if isinstance(entry, Range)]
        for name, hint in hints.items()
    }
