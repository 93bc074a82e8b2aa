"""Warnings with the line of the caller outside this package and torch."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INNER = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def warn(message: str) -> None:
    """Warn with the innermost line outside this package and torch."""
    # The number of frames varies: schedulers, profiling hooks and compilers wrap `step`.
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level)
