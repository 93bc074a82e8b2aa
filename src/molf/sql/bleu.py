"""Sentence BLEU of queries (Papineni et al. 2002), by sacrebleu (Post 2018)."""

from __future__ import annotations

from functools import cache
from typing import Any


def bleu(gold: str, predicted: str, order: int) -> float:
    """Sentence BLEU of two queries, in [0, 1].

    White space separates tokens, case is ignored. N-grams that match nothing are smoothed
    exponentially. A text shorter than `order` tokens is measured by the n-grams that it has, as in
    `sacrebleu.sentence_bleu`; without that, a short query would not even match itself.

    Args:
        gold: The reference.
        predicted: The hypothesis; an empty one scores 0.
        order: Longest n-grams counted: 4 for BLEU-4, 1 for BLEU-1 (precision of words alone).
    """
    hypothesis, reference = (" ".join(text.upper().split()) for text in (predicted, gold))
    score = _scorer(order).sentence_score(hypothesis, [reference]).score
    return min(float(score) / 100, 1.0)  # rounding can leave an exact match just above 100


@cache
def _scorer(order: int) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", smooth_method="exp", max_ngram_order=order, effective_order=True)
