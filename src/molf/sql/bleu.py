"""Sentence BLEU of queries (Papineni et al. 2002), by sacrebleu (Post 2018)."""

from __future__ import annotations

from functools import cache
from typing import Any


def bleu(gold: str, predicted: str, order: int) -> float:
    """Compute the sentence BLEU of two queries, in [0, 1].

    White space separates tokens; case is ignored. N-grams without a match are smoothed
    exponentially. For a text shorter than `order` tokens, only the n-grams that it has count, as in
    `sacrebleu.sentence_bleu`; otherwise a short query would score 0 against itself.

    Args:
        gold: The reference.
        predicted: The hypothesis; an empty one scores 0.
        order: Length of the longest n-grams: 4 for BLEU-4, 1 for BLEU-1 (precision of words).
    """
    hypothesis, reference = (" ".join(text.upper().split()) for text in (predicted, gold))
    score = _scorer(order).sentence_score(hypothesis, [reference]).score
    return min(float(score) / 100, 1.0)  # rounding can leave an exact match just above 100


@cache
def _scorer(order: int) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", smooth_method="exp", max_ngram_order=order, effective_order=True)
