"""Comparison of runs by method, task and model: `molf compare`. No torch."""
