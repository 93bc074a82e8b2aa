"""The winners of a run as a picture: layers from top to bottom, steps from left to right."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from molf.colors import COLORS, EMPTY
from molf.job.record.routing_arrays import read_arrays

COLUMNS, SIDE = 400, 400  # most bins of steps; pixels of the shorter side, about

Pixels = npt.NDArray[np.uint8]


def routing_image(run: Path) -> tuple[Pixels, list[str]]:
    """Return the picture of a run's routing log.

    The colour of a cell is the mean of those of its winners, `molf.colors.COLORS` in the order of
    the experts. Cells without a decision are pale.

    Args:
        run: The directory of the run.

    Returns:
        The pixels [H, W, 3], and the names of the experts.

    Raises:
        InputError: `run` is no run directory, its method does not route, or a part is damaged.
    """
    arrays = read_arrays(run)
    per_column = math.ceil(max(arrays.last_step, 1) / COLUMNS)
    shape = (len(arrays.layers), math.ceil(arrays.last_step / per_column))
    wins = np.zeros((*shape, len(arrays.experts)))
    rows = np.arange(shape[0])
    for part in arrays:
        columns = (part.steps - 1) // per_column
        np.add.at(wins, (rows[None, :], columns[:, None]), part.won & part.decided[:, :, None])
    total = wins.sum(axis=2, keepdims=True)
    colors = np.array([_rgb(COLORS[i % len(COLORS)]) for i in range(len(arrays.experts))])
    mixed = (wins / np.where(total > 0, total, 1)) @ colors
    mixed[total[:, :, 0] == 0] = _rgb(EMPTY)
    pixels: Pixels = np.rint(mixed).astype(np.uint8)
    tall, wide = (max(1, SIDE // length) for length in shape)
    return pixels.repeat(tall, axis=0).repeat(wide, axis=1), arrays.experts


def _rgb(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color.removeprefix("#")))
