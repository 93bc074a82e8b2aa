"""The page of `molf data`: counts, lengths, and records with the tokens that carry loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from molf.report.document import Part, render_parts
from molf.report.figures import Figure, Series, lines
from molf.report.samples import ABOUT_MARKS, MOST, marked_sample

if TYPE_CHECKING:
    from molf.tasks.preview import PreviewedRecord

_SHARES = 101  # points of a line


def render_data(title: str, counts: Sequence[str], records: Sequence[PreviewedRecord]) -> str:
    """Return the page.

    Args:
        title: Task and data.
        counts: Lines of counts, as `molf data` prints them.
        records: All readable records.
    """
    used = [one for one in records if one.is_trained_on]
    parts = [Part("Records", lines=tuple(counts), figures=tuple(_figures(used)))]
    shown = [marked_sample(one.cut()) for one in islice(records, MOST)]
    about = ABOUT_MARKS
    if len(shown) < len(records):
        about += f" The page has the first {len(shown):,} of {len(records):,} records."
    return render_parts(title, parts, samples=shown, about_samples=about)


def _figures(used: Sequence[PreviewedRecord]) -> list[Figure]:
    if len(used) < 2:
        return []
    share = np.linspace(0, 100, _SHARES)
    tokens = np.array([one.tokens for one in used], dtype=np.float64)
    learned = np.array([one.loss_tokens / max(one.tokens, 1) for one in used])
    found = []
    for name, title, values, unit in (
        ("lengths", "Length of the examples", tokens, "tokens"),
        ("loss-share", "Share of tokens with loss", learned, "share of the example's tokens"),
    ):
        at = np.quantile(values, share / 100, method="inverted_cdf")
        text = (
            f"{title} ({unit}): lowest {at[0]:.4g}, median {at[50]:.4g}, highest {at[-1]:.4g}. "
            "The value at x% is that below or at which x% of the examples lie."
        )
        found.append(
            lines(
                name,
                title,
                text,
                share,
                [Series(unit, at)],
                x_label="% of the examples",
                y_label=unit,
            )
        )
    return list(found)
