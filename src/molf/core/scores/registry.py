"""All scores by name, and the texts of `MoLFConfig.score`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from molf.core.scores.descent import DESCENT_SUM
from molf.core.scores.epd import EPD
from molf.core.scores.epd_balanced import EPD_BALANCED
from molf.core.scores.epd_corrected import EPD_CORRECTED
from molf.core.scores.fresh import FRESH_DESCENT
from molf.core.scores.gsnr import GSNR
from molf.core.scores.pfn import PFN
from molf.core.scores.rules import (
    AlwaysFull,
    AlwaysLora,
    Best,
    BestShare,
    Random,
    RandomShare,
    Rule,
    Shuffled,
)
from molf.core.scores.score import Score
from molf.core.scores.shape import SHAPE

_SHIPPED = {
    score.name: score
    for score in (EPD, PFN, GSNR, FRESH_DESCENT, DESCENT_SUM, EPD_BALANCED, EPD_CORRECTED, SHAPE)
}
_CONTROLS: dict[str, Rule] = {"random": Random(), "full": AlwaysFull(), "lora": AlwaysLora()}
SCORES = (*_SHIPPED, *_CONTROLS)
"""Scores and controls without a parameter."""

FORMS = ("random:Q", "share:Q:SCORE", "shuffled:SCORE")
"""Scores with a parameter: Q is above 0 and below 1, SCORE one of the scores."""

_registered: dict[str, Score] = {}


@dataclass(frozen=True)
class Routing:
    """Meaning of a text of `MoLFConfig.score`.

    Attributes:
        score: Score of the experts. `full` and `random` record it and ignore it.
        rule: Choice of the winners.
    """

    score: Score
    rule: Rule


def register_score(score: Score) -> None:
    """Add a score, for `MoLFConfig(score=score.name)` in this process.

    A checkpoint of its optimizer loads only where the score is registered. Registering the name
    again replaces the score; the shipped ones cannot be replaced.

    Args:
        score: The score. Its terms and its function are tried on small tensors of 3 x 4 weights.

    Raises:
        TypeError: It is no `Score`, or a part of it has a wrong type.
        ValueError: A name is not allowed or given twice, or the trial fails.
    """
    from molf.core.scores.checks import check_score  # it imports torch, which names need not

    check_score(score, (*SCORES, *_WORDS))
    _registered[score.name] = score
    _parsed.cache_clear()


_WORDS = ("share", "shuffled")


def routing(text: str) -> Routing:
    """Return the score and the rule of a text.

    Raises:
        ValueError: The text names no score; the message has the allowed texts.
    """
    if isinstance(text, str) and (found := _parsed(text)):
        return found
    known = (*_SHIPPED, *_registered)
    raise ValueError(
        f"Invalid score={text!r}. Must be one of {', '.join((*SCORES, *_registered, *FORMS))} "
        f"(0 < Q < 1; SCORE: {', '.join(known)})."
    )


@cache
def _parsed(text: str) -> Routing | None:
    """Return the score and the rule of a text; None if it names no score."""
    known = {**_SHIPPED, **_registered}
    word, *parameters = text.split(":")
    if word in known and not parameters:
        return Routing(known[word], Best())
    if word in _CONTROLS and not parameters:
        return Routing(EPD, _CONTROLS[word])
    if word == "random" and len(parameters) == 1 and (share := _share(parameters[0])):
        return Routing(EPD, RandomShare(share))
    if word == "shuffled" and len(parameters) == 1 and parameters[0] in known:
        return Routing(known[parameters[0]], Shuffled())
    is_known = word == "share" and len(parameters) == 2 and parameters[1] in known
    if is_known and (share := _share(parameters[0])):
        return Routing(known[parameters[1]], BestShare(share))
    return None


def _share(text: str) -> float | None:
    """Return a share above 0 and below 1; None for another text."""
    if not re.fullmatch(r"0?\.[0-9]+", text):
        return None
    share = float(text)
    return share if 0 < share < 1 else None
