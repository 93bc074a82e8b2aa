"""Faults that a person could plausibly make, and a pytest plugin (`-p faults`) that plants one.

The environment variable MOLF_PLANTED_FAULT names the fault; `scripts/planted_faults.py` sets it.
"""

from __future__ import annotations

import os

from faults import method, schedule, sharding, storage  # noqa: F401  (they register their faults)
from faults.planting import FAULTS, Fault, TargetError, fault, find, plant

VARIABLE = "MOLF_PLANTED_FAULT"

__all__ = ["FAULTS", "VARIABLE", "Fault", "TargetError", "fault", "find", "plant"]


def pytest_configure() -> None:
    """Plant the fault before tests are imported."""
    name = os.environ.get(VARIABLE)
    if name:
        plant(next(one for one in FAULTS if one.name == name))
