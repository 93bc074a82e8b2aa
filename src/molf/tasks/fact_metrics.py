"""Efficacy, paraphrase and neighbourhood scores of changed facts (Meng et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from molf.measure.metric import (
    Evaluation,
    FloatArray,
    Metric,
    bootstrap,
    ratio_of_sums,
    wilson,
)
from molf.tasks.first_token import Comparison

REWRITE = "rewrite"
KINDS = (REWRITE, "paraphrase", "neighbourhood")
_NAMES = {REWRITE: ("es", "em"), "paraphrase": ("ps", "pm"), "neighbourhood": ("ns", "nm")}

Outcomes = dict[str, list[Comparison]]
"""The comparisons of one request, by kind of prompt."""


def fact_metric_names(kinds: Collection[str]) -> tuple[str, ...]:
    """Return the names of the scores over requests with these kinds of prompts."""
    names = [name for kind, pair in _NAMES.items() if kind in kinds for name in pair]
    return (*names, "s") if len(names) == 2 * len(_NAMES) else tuple(names)


def fact_metrics(cases: Sequence[Outcomes], seed: int) -> Evaluation:
    """Compute the scores over all requests.

    A share (`es`, `ps`, `ns`) counts the prompts after which the first token of the wanted target
    is likelier than that of the other. The wanted target is the new one; for neighbourhood prompts
    it is the true one. A magnitude (`em`, `pm`, `nm`) is the mean of the wanted minus the other
    probability. `s` is the harmonic mean of the three shares. Intervals resample the requests,
    because prompts of one request are correlated; shares over one prompt per request have Wilson's
    intervals.

    Args:
        cases: The comparisons of each request.
        seed: Seed of the bootstrap.

    Returns:
        The metrics that have observations; the notes count ties and name the missing metrics.
    """
    metrics: dict[str, Metric] = {}
    ties: dict[str, int] = {}
    left_out: dict[str, str] = {}
    columns: dict[str, FloatArray] = {}  # per kind: successes and prompts of each request
    for kind, (share, magnitude) in _NAMES.items():
        sign = -1 if kind == "neighbourhood" else 1
        table = np.array([_sums(case[kind], sign) for case in cases])
        prompts = int(table[:, 2].sum())
        columns[kind] = table[:, [0, 2]]
        ties[kind] = sum(comparison.tie for case in cases for comparison in case[kind])
        if prompts == 0:
            left_out[share] = left_out[magnitude] = f"the records have no {kind} prompts"
            continue
        asked = table[table[:, 2] > 0]
        metrics[share] = _share(asked[:, [0, 2]], seed)
        mean = bootstrap(asked[:, [1, 2]], ratio_of_sums, seed)
        metrics[magnitude] = replace(mean, count=prompts)
    if all(share in metrics for share, _ in _NAMES.values()):
        metrics["s"] = bootstrap(np.hstack([columns[kind] for kind in KINDS]), _harmonic, seed)
    else:
        left_out["s"] = "it needs es, ps and ns"
    return Evaluation(metrics, notes={"ties": ties, "metrics_left_out": left_out})


def _share(columns: FloatArray, seed: int) -> Metric:
    """Compute a share from the successes and prompts of each request with prompts: [n, 2]."""
    successes, prompts = (int(total) for total in columns.sum(axis=0))
    if successes in (0, prompts):  # all resamples are equal: count each request as one prompt
        found = wilson(len(columns) if successes else 0, len(columns))
    elif prompts == len(columns):
        found = wilson(successes, prompts)
    else:
        found = bootstrap(columns, ratio_of_sums, seed)
    return replace(found, count=prompts)


def _sums(comparisons: list[Comparison], sign: int) -> tuple[float, float, float]:
    """Return successes, summed probability differences and comparisons; a tie is no success."""
    differences = [sign * (math.exp(c.log_p_new) - math.exp(c.log_p_true)) for c in comparisons]
    # Compare logarithms: they differ even where both probabilities round to 0.
    successes = sum(sign * c.log_p_new > sign * c.log_p_true for c in comparisons)
    return successes, math.fsum(differences), len(comparisons)


def _harmonic(sums: FloatArray) -> FloatArray:
    """Compute the harmonic mean of three shares, each (successes, prompts): [m, 6] to [m].

    It is 0 where a share is 0, and NaN where a resample drew no prompt of one kind.
    """
    shares = np.stack([ratio_of_sums(sums[:, start : start + 2]) for start in (0, 2, 4)], axis=1)
    with np.errstate(divide="ignore"):
        return 3 / (1 / shares).sum(axis=1)
