"""Efficacy, paraphrase and neighbourhood scores of changed facts (Meng et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from molf.evaluate.metric import (
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


def fact_metrics(cases: Sequence[Outcomes], seed: int) -> Evaluation:
    """The scores over all requests.

    A share (`es`, `ps`, `ns`) counts the prompts after which the wanted target's first token is
    the likelier one: the new target's, and for neighbourhood prompts the true one's. A magnitude
    (`em`, `pm`, `nm`) is the mean of the wanted minus the other probability; its interval resamples
    the requests, since the prompts of one request move together. `s` is the harmonic mean of the
    three shares.

    Args:
        cases: The comparisons of each request.
        seed: Seed of the bootstrap.

    Returns:
        The metrics that have observations; the notes count ties and name what was left out.
    """
    metrics: dict[str, Metric] = {}
    ties: dict[str, int] = {}
    left_out: dict[str, str] = {}
    columns: dict[str, FloatArray] = {}  # per kind: successes and prompts of each request
    for kind, (share, magnitude) in _NAMES.items():
        sign = -1 if kind == "neighbourhood" else 1
        table = np.array([_sums(case[kind], sign) for case in cases])
        successes, prompts = int(table[:, 0].sum()), int(table[:, 2].sum())
        columns[kind] = table[:, [0, 2]]
        ties[kind] = sum(comparison.tie for case in cases for comparison in case[kind])
        if prompts == 0:
            left_out[share] = left_out[magnitude] = f"the records have no {kind} prompts"
            continue
        metrics[share] = wilson(successes, prompts)
        mean = bootstrap(table[:, [1, 2]], ratio_of_sums, seed)
        metrics[magnitude] = replace(mean, count=prompts)
    if all(share in metrics for share, _ in _NAMES.values()):
        metrics["s"] = bootstrap(np.hstack([columns[kind] for kind in KINDS]), _harmonic, seed)
    else:
        left_out["s"] = "it needs es, ps and ns"
    return Evaluation(metrics, notes={"ties": ties, "metrics_left_out": left_out})


def _sums(comparisons: list[Comparison], sign: int) -> tuple[float, float, float]:
    """Successes, summed probability differences and number of comparisons; ties never succeed."""
    differences = [sign * (math.exp(c.log_p_new) - math.exp(c.log_p_true)) for c in comparisons]
    # Logarithms still differ where both probabilities round to 0.
    successes = sum(sign * c.log_p_new > sign * c.log_p_true for c in comparisons)
    return successes, math.fsum(differences), len(comparisons)


def _harmonic(sums: FloatArray) -> FloatArray:
    """Harmonic mean of three shares, given as (successes, prompts) each: [m, 6] to [m].

    It is 0 where a share is 0, and NaN where a resample drew no prompt of one kind.
    """
    shares = np.stack([ratio_of_sums(sums[:, start : start + 2]) for start in (0, 2, 4)], axis=1)
    with np.errstate(divide="ignore"):
        return 3 / (1 / shares).sum(axis=1)
