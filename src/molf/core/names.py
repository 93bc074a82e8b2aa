"""The words that options take; without torch, so that the command line is fast."""

ROUNDINGS = ("exact", "stochastic", "nearest")
"""How bfloat16 weights are written."""

STATE_DTYPES = ("float32", "8bit")
"""How moments are kept."""

KERNELS = ("eager", "triton")
"""Who computes the optimizer's step."""
