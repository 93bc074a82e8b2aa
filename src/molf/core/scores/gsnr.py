"""Signal-to-noise ratio of the gradient."""

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import DESCENT, NOISE


def gsnr(expert: Expert) -> float:
    """Return `sum m^2 / (sqrt(v) + eps) / sum sqrt(v)`; 0 for an expert without a gradient so far.

    It contains no rate, scaling or shape. Gradients of pure noise give every expert the same score.
    A, whose gradient is zero while B = 0, adds nothing to either sum. arXiv 2001.07384
    relates the signal-to-noise ratio of gradients to generalisation.
    """
    noise = expert.total("noise")
    return expert.total("descent") / noise if noise else 0.0


GSNR = Score("gsnr", (DESCENT, NOISE), gsnr)
