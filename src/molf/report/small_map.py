"""A map of winners for a terminal: a character for the most frequent winner of some steps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from molf.job.record.routing_arrays import pooled_rows, read_arrays

ROWS, COLUMNS = 24, 60
_NONE = "."
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"


class SmallMap(NamedTuple):
    """The map.

    Attributes:
        marks: The character of each expert.
        rows: First layer of each row, and a character for each bin of steps.
        layers_per_row: The largest number of layers of a row; all are of one kind.
        steps_per_column: Number of steps of a bin.
    """

    marks: dict[str, str]
    rows: list[tuple[str, str]]
    layers_per_row: int
    steps_per_column: int

    @property
    def legend(self) -> str:
        """Meaning of characters, rows and columns."""
        experts = ", ".join(f"{mark} {name}" for name, mark in self.marks.items())
        cell = [f"{self.layers_per_row} layers of a kind"] if self.layers_per_row > 1 else []
        cell += [f"{self.steps_per_column} steps"] if self.steps_per_column > 1 else []
        of = f" of {' and '.join(cell)}" if cell else ""
        return f"most frequent winner{of}: {experts}, {_NONE} none; steps from left to right"


def small_map(run: Path, *, rows: int = ROWS, columns: int = COLUMNS) -> SmallMap:
    """Return the map of a run.

    Args:
        run: The directory of the run.
        rows: The largest number of rows, unless there are more kinds of layers.
        columns: The largest number of columns.

    Raises:
        InputError: `run` is no run directory, its method does not route, or a part is damaged.
    """
    arrays = read_arrays(run)
    per_column = math.ceil(arrays.last_step / columns)
    row_of = pooled_rows(arrays.layers, rows)
    starts, sizes = np.unique(row_of, return_index=True, return_counts=True)[1:]
    shape = (len(starts), math.ceil(arrays.last_step / per_column))
    wins = np.zeros((*shape, len(arrays.experts)), dtype=np.int64)
    for part in arrays:
        column_of = (part.steps - 1) // per_column
        np.add.at(wins, (row_of[None, :], column_of[:, None]), part.won & part.decided[:, :, None])
    numbers = iter(_MARKS)
    marks = {name: "F" if name == "full" else next(numbers, "z") for name in arrays.experts}
    characters = np.where(wins.any(axis=2), np.array([*marks.values()])[wins.argmax(axis=2)], _NONE)
    names = [_short(arrays.layers[start]) for start in starts]
    return SmallMap(
        marks,
        [(name, "".join(line)) for name, line in zip(names, characters, strict=True)],
        int(sizes.max()),
        per_column,
    )


def _short(name: str) -> str:
    """Return a layer's name from its first number on."""
    found = re.search(r"(?:^|\.)(\d+\..*)", name)
    return found[1] if found else name
