"""Preconditioned Frobenius norm."""

import math

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import NORM


def pfn(expert: Expert) -> float:
    """Return `sqrt(sum (m / (sqrt(v) + eps))^2 / n_e)` (arXiv 2605.07111, Eq. 11)."""
    return math.sqrt(expert.total("norm") / expert.size)


PFN = Score("pfn", (NORM,), pfn)
