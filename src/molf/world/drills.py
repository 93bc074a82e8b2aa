"""Exercises that base models get apart from texts: something given, and answers that follow."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Drill:
    """Something given, and questions that it answers.

    No answer follows from the answers before it; where one would, models learn that first, and the
    rest hardly ever.

    Attributes:
        given: What comes first.
        answers: Pairs of a question and its answer, one after the other.
    """

    given: str
    answers: tuple[tuple[str, str], ...]
