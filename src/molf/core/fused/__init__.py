"""The optimizer's elementwise work and low-rank writes as Triton kernels, opt-in.

Importing this package needs triton (`pip install "molf[triton]"`); nothing else in the core imports
it. docs/kernels.md explains the passes and what has been checked on which hardware.
"""

from molf.core.fused.items import AdamW, LowRank, Moments, Weight
from molf.core.fused.kernels import Kernels

__all__ = ["AdamW", "Kernels", "LowRank", "Moments", "Weight"]
