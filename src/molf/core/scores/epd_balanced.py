"""EPD relative to its expectation for gradients of pure noise."""

from molf.core.scores.score import Expert, Score
from molf.core.scores.shape import noise_share
from molf.core.scores.terms import DESCENT


def epd_balanced(expert: Expert) -> float:
    """Return EPD divided by its expectation under noise, for B = 0 (`noise_share`).

    Rates cancel. With pure noise all experts start equal, so that only evidence tips the choice.
    """
    return expert.total("descent") / expert.size / noise_share(expert)


EPD_BALANCED = Score("epd-balanced", (DESCENT,), epd_balanced)
