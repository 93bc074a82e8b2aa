"""Descent on a batch that has not shaped the direction."""

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import FRESH

_DECAY = 0.9  # of the average: ten steps


def fresh(expert: Expert) -> float:
    """Return `lr_e / n_e * EMA(sum g_t m_{t-1} / (sqrt(v_{t-1}) + eps))`, with a decay of 0.9.

    m_{t-1} does not contain the gradient of this step, so noise of the batch adds nothing on
    average. In the first epoch this is the descent on unseen examples. It is 0 in the first step
    and may be negative.
    """
    kept = expert.kept
    kept["ema"] = _DECAY * kept["ema"] + (1 - _DECAY) * expert.total("fresh")
    return expert.lr * kept["ema"] / expert.size


FRESH_DESCENT = Score("fresh", (FRESH,), fresh, kept={"ema": 0.0})
