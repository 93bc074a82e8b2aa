"""Exercises for base models beside the texts: a given text, then questions with answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Drill:
    """A given text, and questions that it answers.

    No answer can be inferred from the answers before it; otherwise models learn that inference
    instead of reading the given text.

    Attributes:
        given: The text before the questions.
        answers: Pairs of a question and its answer, in order.
    """

    given: str
    answers: tuple[tuple[str, str], ...]
