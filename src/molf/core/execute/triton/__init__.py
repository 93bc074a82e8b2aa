"""Triton kernels for the elementwise operations and low-rank writes of a step; opt-in.

Importing this package needs triton (`pip install "molf[triton]"`). docs/kernels.md describes the
passes and the hardware that they were checked on.
"""

from molf.core.execute.triton.items import AdamW, LowRank, Moments, Weight
from molf.core.execute.triton.kernels import Kernels

__all__ = ["AdamW", "Kernels", "LowRank", "Moments", "Weight"]
