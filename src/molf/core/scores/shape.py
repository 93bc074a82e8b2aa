"""Expectation of EPD for gradients of pure noise: a choice fixed by shape, scaling and rates."""

import math

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import DESCENT


def noise_share(expert: Expert) -> float:
    """Return the mean of `m^2 / sqrt(v)` for a gradient of noise and B = 0, relative to `full`.

    For a gradient G of independent entries of deviation sigma, `grad B = s G A^T` has entries of
    deviation `s sigma / sqrt(3)`, because A is uniform in +-1/sqrt(in), and `grad A` is zero. The
    mean over A and B is `s / sqrt(3) * out / (in + out)`.
    """
    if expert.rank is None:
        return 1.0
    out_features, in_features = expert.shape
    return expert.scaling / math.sqrt(3) * out_features / (in_features + out_features)


def shape(expert: Expert) -> float:
    """Return `lr_e` times `noise_share`: the gradient plays no part.

    A control: winners are those of EPD if no gradient contained any signal.
    """
    return expert.lr * noise_share(expert)


# It reads no sum; every score records one.
SHAPE = Score("shape", (DESCENT,), shape)
