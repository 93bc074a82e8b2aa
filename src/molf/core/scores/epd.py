"""Expected preconditioned descent."""

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import DESCENT


def epd(expert: Expert) -> float:
    """Return `lr_e / n_e * sum m^2 / (sqrt(v) + eps)` (arXiv 2605.07111, Eq. 10)."""
    return expert.lr * expert.total("descent") / expert.size


EPD = Score("epd", (DESCENT,), epd)
