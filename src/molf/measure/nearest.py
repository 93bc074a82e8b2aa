"""Search for the most similar training text, whose answer is a baseline of pure memory."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def nearest(training: Sequence[str], asked: Sequence[str]) -> list[int]:
    """Return the index of the most similar training text for each asked text.

    Similarity is the share of distinct words (lower-cased) that two texts have in common
    (Jaccard 1901); of equally similar texts the first is taken.

    Args:
        training: The texts to choose from, at least one.
        asked: The texts to compare with them.
    """
    if not training:
        raise ValueError("There is no training text to be near to.")
    sizes = []
    holders: dict[str, list[int]] = defaultdict(list)  # per word the texts that contain it
    for position, text in enumerate(training):
        words = _words(text)
        sizes.append(len(words))
        for word in words:
            holders[word].append(position)
    return [_nearest(_words(text), sizes, holders) for text in asked]


def similarity(first: str, second: str) -> float:
    """Return the share of distinct words that two texts have in common, in [0, 1]."""
    words, others = _words(first), _words(second)
    return len(words & others) / len(words | others) if words or others else 0.0


def _nearest(words: set[str], sizes: list[int], holders: dict[str, list[int]]) -> int:
    shared = Counter(position for word in words for position in holders.get(word, ()))
    return min(
        shared,
        key=lambda p: (-shared[p] / (len(words) + sizes[p] - shared[p]), p),
        default=0,
    )


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
