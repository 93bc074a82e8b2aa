"""Few-shot demonstrations: questions with answers, placed before the question of a prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

from molf.errors import InputError
from molf.tasks.questions import Question


class Demonstrations:
    """Draws the demonstrations once for all prompts; skips those equal to a prompt's question.

    Args:
        pool: The training questions.
        count: Number of demonstrations before a question.
        seed: Seed of the draw.
    """

    def __init__(self, pool: Sequence[Question], count: int, seed: int) -> None:
        self._count = count
        self._order = random.Random(seed).sample(pool, len(pool)) if count else []

    def before(self, asked: Question) -> list[Question]:
        """Return the demonstrations for a question.

        Raises:
            InputError: The pool has too few other questions.
        """
        wanted = _words(asked)
        others = (question for question in self._order if _words(question) != wanted)
        found = list(islice(others, self._count))
        if len(found) < self._count:
            raise InputError(
                f"few_shot={self._count} needs as many training records with other questions "
                f"than the evaluated one, but there are {len(found)}. Evaluated records and those "
                "of a validation part are never shown: evaluate fewer records (max_samples), or "
                "give data with a training split."
            )
        return found


def _words(question: Question) -> list[str]:
    return question.question.lower().split()
