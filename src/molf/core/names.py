"""Allowed words of options. Does not import torch: the command line imports it at start."""

ROUNDINGS = ("exact", "stochastic", "nearest")
"""Roundings of bfloat16 weights."""

STATE_DTYPES = ("float32", "8bit")
"""Storage of moments."""

KERNELS = ("eager", "triton")
"""Executors of the optimizer's step."""
