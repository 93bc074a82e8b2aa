"""Expected descent as a sum over the parameters of an expert."""

from molf.core.scores.score import Expert, Score
from molf.core.scores.terms import DESCENT


def descent(expert: Expert) -> float:
    """Return `lr_e * sum m^2 / (sqrt(v) + eps)`: EPD without its division by n_e.

    It is the first-order decrease of the loss by a step of the expert, if the next gradient is m.
    """
    return expert.lr * expert.total("descent")


DESCENT_SUM = Score("descent", (DESCENT,), descent)
