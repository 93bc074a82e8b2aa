"""EPD relative to its expectation for gradients of pure noise."""

import math

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import DESCENT


def epd_balanced(expert: Expert) -> float:
    """Return EPD divided by its expectation under noise, for B = 0.

    For a gradient G of independent entries of deviation sigma, `grad B = s G A^T` has entries of
    deviation `s sigma / sqrt(3)`, because A is uniform in +-1/sqrt(in), and `grad A` is zero. EPD
    is then proportional to `lr` for `full`, and to `lora_lr s / sqrt(3) * out / (in + out)` for a
    LoRA expert. Rates cancel. With pure noise all experts start equal.
    """
    mean = expert.total("descent") / expert.count
    if expert.rank is None:
        return mean
    out_features, in_features = expert.shape
    return mean / (expert.scaling / math.sqrt(3) * out_features / (in_features + out_features))


EPD_BALANCED = Score("epd-balanced", (DESCENT,), epd_balanced)
