"""EPD over the parameters that can move."""

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import DESCENT


def epd_corrected(expert: Expert) -> float:
    """Return EPD with n_e counted over tensors that have had a gradient.

    While B = 0, A has none, and EPD divides the sum over B by the parameters of both.
    """
    count = sum(part.size for part in expert.parts if part.sums["descent"])
    return expert.lr * expert.total("descent") / count if count else 0.0


EPD_CORRECTED = Score("epd-corrected", (DESCENT,), epd_corrected)
