"""Compare drawings of data, whatever fonts and margins the drawing library gives them.

Fonts differ between versions of matplotlib, and move frames and labels by some pixels. So panels
are compared inside their frames, in shares of width and height, and legends by their coloured
symbols. Text is not compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from matplotlib.image import imread

REACH = 3  # pixels by which a line may lie elsewhere, at most
COLOUR = 0.25  # distance of equal colours, of 1, because edges are blended with the ground


def difference(first: Path, second: Path) -> float:
    """Return the largest share of coloured pixels of a panel or legend that the other one lacks.

    1.0 if the drawings have other numbers of panels.
    """
    mine, other = (list(_parts(imread(path)[..., :3])) for path in (first, second))
    if len(mine) != len(other):
        return 1.0
    pairs = list(zip(mine, other, strict=True))
    return max(_missing(a, b) for one, two in pairs for a, b in ((one, two), (two, one)))


def _parts(image: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the inside of each panel, and the symbols of the legend beside them."""
    dark = image.max(axis=-1) < 0.3
    sides = _lines(dark.mean(axis=0) > 0.5)
    assert sides, "no frame"
    assert len(sides) % 2 == 0, sides
    for left, right in list(pairwise(sides))[::2]:
        ends = _lines(dark[:, left : right + 1].mean(axis=1) > 0.8)
        yield image[ends[0] + 3 : ends[-1] - 2, left + 3 : right - 2]
    beside = image[:, sides[-1] + 3 :]
    rows, columns = np.nonzero(_is_coloured(beside))
    if len(rows):
        yield beside[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def _lines(marked: np.ndarray) -> list[int]:
    """Return the first index of each run of marked ones."""
    return [int(i) for i in np.flatnonzero(marked & ~np.roll(marked, 1))]


def _is_coloured(image: np.ndarray) -> np.ndarray:
    return image.max(axis=-1) - image.min(axis=-1) > 0.25


def _missing(image: np.ndarray, other: np.ndarray) -> float:
    """Return the share of pixels amid their colour without one of it near the same place."""
    rows, columns = np.nonzero(_is_coloured(image))
    colours = image[rows, columns]
    # Where lines cover each other, a fringe of the lower one may show.
    whole = np.ones(len(rows), dtype=bool)
    for shift in product((-1, 0, 1), repeat=2):
        whole &= _are_near(image, rows, columns, colours, shift)
    rows, columns, colours = (x[whole] for x in (rows, columns, colours))
    count = len(rows)
    rows = np.rint(rows * (other.shape[0] - 1) / (image.shape[0] - 1)).astype(int)
    columns = np.rint(columns * (other.shape[1] - 1) / (image.shape[1] - 1)).astype(int)
    # Nearest shifts first, each for those not found yet: nearly all are found at their own place.
    reach = range(-REACH, REACH + 1)
    for shift in sorted(product(reach, repeat=2), key=lambda one: abs(one[0]) + abs(one[1])):
        lacking = ~_are_near(other, rows, columns, colours, shift)
        rows, columns, colours = (x[lacking] for x in (rows, columns, colours))
    return len(rows) / count if count else 0.0


def _are_near(
    image: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    colours: np.ndarray,
    shift: tuple[int, int],
) -> np.ndarray:
    """Return whether each place, moved by a shift, has a colour."""
    height, width = image.shape[:2]
    down, right = shift
    near = image[np.clip(rows + down, 0, height - 1), np.clip(columns + right, 0, width - 1)]
    return np.abs(near - colours).max(axis=-1) < COLOUR
