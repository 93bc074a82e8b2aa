"""Scores per question, from the predictions of a run, for paired comparisons.

A score is (successes, attempts): a metric that is a share is the ratio of the sums over questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Scores = dict[str, dict[str, tuple[float, float]]]

# Metrics per kind of prompt of an edited fact; the true target is wanted after the last.
_FACTS = {"rewrite": "es", "paraphrase": "ps", "neighbourhood": "ns"}
# Fields of an SQL answer whose means are metrics.
_SQL = (
    "execution_accuracy",
    "execution_accuracy_set",
    "exact_match",
    "logic_match",
    "bleu_1",
    "bleu_4",
    "valid_sql",
)
# The parts of metrics that are the harmonic mean of others.
HARMONIC = {"s": ("es", "ps", "ns")}


def question_scores(predictions: Iterable[Mapping[str, Any]]) -> Scores:
    """Return the scores of each question by metric and index.

    Args:
        predictions: The lines of a run's `predictions.jsonl`.
    """
    scores: Scores = {}
    for entry in predictions:
        if entry.get("prediction") is None:
            continue
        index = str(entry["index"])
        for metric, part, whole in _scores(entry):
            scores.setdefault(metric, {})[index] = (part, whole)
    return scores


def _scores(entry: Mapping[str, Any]) -> Iterable[tuple[str, float, float]]:
    text = str(entry["prediction"]).strip()
    if "target_new" in entry:
        yield "acc_new", float(text.startswith(entry["target_new"])), 1
        for kind, metric in _FACTS.items():
            pairs = entry.get(kind) or []
            sign = -1 if kind == "neighbourhood" else 1
            right = sum(sign * pair["p_new"] > sign * pair["p_true"] for pair in pairs)
            if pairs:
                yield metric, float(right), float(len(pairs))
    elif "answer" in entry:
        yield "accuracy", float(entry["answer"] == entry.get("expected")), 1
        if "log_probs" in entry:
            likeliest = max(entry["log_probs"], key=entry["log_probs"].get)
            yield "accuracy_logprob", float(likeliest == entry.get("expected")), 1
    elif "loss" in entry:
        yield "exact_match", float(text == str(entry.get("expected", "")).strip()), 1
    else:
        for metric in _SQL:
            if isinstance(entry.get(metric), (bool, float)):
                yield metric, float(entry[metric]), 1
