"""The page of `molf data`: counts, lengths, and records with the tokens that carry loss marked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from molf.report.document import Part, render_parts
from molf.report.figures import Figure, Series, lines
from molf.report.samples import MOST
from molf.shown import printable

if TYPE_CHECKING:
    from molf.tasks.preview import PreviewedRecord

MOST_CHARACTERS = 4000  # of one record
_SHARES = 101  # points of a line


def render_data(title: str, counts: Sequence[str], records: Sequence[PreviewedRecord]) -> str:
    """Return the page.

    Args:
        title: Task and data.
        counts: Lines of counts, as `molf data` prints them.
        records: All readable records.
    """
    used = [one for one in records if one.left_out is None and not one.held_out]
    parts = [Part("Records", lines=tuple(counts), figures=tuple(_figures(used)))]
    shown = [_sample(one) for one in islice(records, MOST)]
    about = "Marked text carries loss: the model learns to predict it."
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


def _sample(record: PreviewedRecord) -> dict[str, Any]:
    segments, left = [], MOST_CHARACTERS
    total = sum(len(text) for text, _ in record.segments)
    for text, has_loss in record.segments:
        if left > 0:
            segments.append([printable(text[:left]), has_loss])
        left -= len(text)
    if left < 0:
        segments.append([f" […] ({-left:,} of {total:,} characters more)", False])
    state = f"left out: {record.left_out}" if record.left_out else ""
    return {
        "index": record.index,
        "task": "",
        "right": None,
        "state": state or ("held out to evaluate" if record.held_out else ""),
        "about": f"{record.tokens:,} tokens, {record.loss_tokens:,} with loss",
        "segments": segments,
        "main": 0,
        "texts": [["doubtful", fault] for fault in record.faults],
    }
