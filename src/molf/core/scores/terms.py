"""Sums that the scores share."""

from __future__ import annotations

from molf.core.scores.score import ScoreTerm

DESCENT = ScoreTerm("descent", lambda block: (block.direction, block.exp_avg))
"""`sum m^2 / (sqrt(v) + eps)`."""

NORM = ScoreTerm("norm", lambda block: (block.direction, block.direction))
"""`sum (m / (sqrt(v) + eps))^2`."""

NOISE = ScoreTerm("noise", lambda block: (block.exp_avg_sq.sqrt(),))
"""`sum sqrt(v)`."""

FRESH = ScoreTerm("fresh", lambda block: (block.direction, block.grad), is_before=True)
"""`sum g_t m_{t-1} / (sqrt(v_{t-1}) + eps)`."""

SHIPPED_TERMS = {term.name: term for term in (DESCENT, NORM, NOISE, FRESH)}
"""The terms above by name."""
