"""One line of explanation for each metric, shown under tables of results."""

from __future__ import annotations

from collections.abc import Iterable

METRICS_VERSION = 2
"""Raised when a metric has another value for equal answers, or the embedded data change."""

UNRECORDED_VERSION = 1
"""The version of metrics from before it was recorded."""

_CHANGED = {
    2: ("execution_accuracy", "execution_accuracy_set", "execution_accuracy_with_rows", "valid_sql")
}
"""The metrics that a version changed."""

_MEANINGS = (
    (("es", "em"), "new target over true one, edited prompt: share, mean difference of p"),
    (("ps", "pm"), "the same for paraphrases"),
    (("ns", "nm"), "true target over new one, other subjects (should stay high)"),
    (("s",), "harmonic mean of es, ps and ns"),
    (("acc_new", "acc_true"), "greedy text after the edited prompt begins with that target"),
    (("accuracy",), "share of questions answered rightly in the generated text"),
    (("unparsed",), "share of answers without an option or a number (lower is better)"),
    (("accuracy_logprob",), "share of questions whose likeliest option letter is right"),
    (("execution_accuracy",), "query returns the gold rows: duplicates count, order where asked"),
    (
        ("execution_accuracy_with_rows",),
        "the same over gold queries that find or change something",
    ),
    (("execution_accuracy_set",), "execution_accuracy with rows as a set"),
    (("exact_match",), "text equals the expected one after trimming"),
    (("logic_match",), "syntax trees are equal, aliases aside"),
    (("bleu_1", "bleu_4"), "overlap of words with the gold query, 0 to 1"),
    (("valid_sql",), "query runs on its schema"),
    (("loss",), "nats per completion token (lower is better)"),
    (("perplexity",), "exp of that (lower is better)"),
    (("forgetting_loss",), "nats per token of held-out text (lower is better)"),
    (("kl_neutral",), "KL(base || model) on that text, nats per token (0: the base's predictions)"),
    (("kl_task",), "the same on the task's prompts, without answers"),
)

# Editing replaces the true target, so neither high nor low is better in itself.
_UNRANKED = ("acc_true",)

_MAIN = ("s", "execution_accuracy", "accuracy", "exact_match")

_LOWER_IS_BETTER = (
    "unparsed",
    "loss",
    "perplexity",
    "forgetting_loss",
    "kl_neutral",
    "kl_task",
)


def last_change(metrics: Iterable[str], version: int) -> int:
    """Return the last version, up to this one, that changed one of these metrics; else 1.

    A version newer than `METRICS_VERSION` is returned as it is: its changes are not known here.
    """
    if version > METRICS_VERSION:
        return version
    given = set(metrics)
    return max(
        (v for v, names in _CHANGED.items() if v <= version and given & set(names)), default=1
    )


def meanings(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Return (names, meaning) for the given metrics in their order, names joined by a comma."""
    given = list(metrics)
    rows = []
    for names, meaning in _MEANINGS:
        shown = [name for name in names if name in given]
        if shown:
            rows.append((given.index(shown[0]), ", ".join(shown), meaning))
    return [row[1:] for row in sorted(rows)]


def metric_names() -> tuple[str, ...]:
    """Return the names of all metrics."""
    return tuple(name for names, _ in _MEANINGS for name in names)


def is_lower_better(metric: str) -> bool:
    """Return whether a lower value of a metric is better."""
    return metric in _LOWER_IS_BETTER


def is_ranked(metric: str) -> bool:
    """Return whether a higher or a lower value of a metric is better."""
    return metric not in _UNRANKED


def main_metric(metrics: Iterable[str]) -> str | None:
    """Return the metric that a task is about; the first one for an unknown task, None for none."""
    names = list(metrics)
    return next((name for name in _MAIN if name in names), names[0] if names else None)
