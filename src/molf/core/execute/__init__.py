"""Executors of a step's operations: torch, or Triton kernels."""
