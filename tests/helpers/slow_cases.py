"""Parameters of a test, most of which run in `make test-slow` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(fast: int, cases: Iterable[Any]) -> list[Any]:
    """Return the cases as parameters; those after the first few are marked slow."""
    return [
        case if index < fast else pytest.param(*_values(case), marks=pytest.mark.slow)
        for index, case in enumerate(cases)
    ]


def _values(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)
