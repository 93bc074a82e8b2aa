"""Each process's share of the examples: every example once per epoch, in the order of one process.

The examples of an optimizer step are those that one process with the same global batch would take.
Processes need equally many batches, so the last ones are filled with blank rows. A blank row has no
label: it adds 0 to the sum of the losses, which is divided by the labels of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler

from molf.data.encoding import EncodedSamples
from molf.data.rows import Rows
from molf.errors import InputError
from molf.measure.tokens import IGNORED

# Two tokens: the loss leaves out the first.
_BLANK = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}
_STRATEGIES = ("random", "sequential")


def training_set(samples: EncodedSamples, *, with_blank_row: bool) -> Dataset:
    """Return the examples as the trainer reads them, and perhaps a blank row behind them."""
    if samples.known is not None:
        return _read_on_demand(samples)
    columns = {}
    for name, rows in (("input_ids", samples.input_ids), ("labels", samples.labels)):
        if with_blank_row:
            rows = [*rows, _BLANK[name]]
        columns[name] = (rows if isinstance(rows, Rows) else Rows(rows)).as_arrow()
    # Without a fingerprint of our own, `datasets` would hash all values.
    return Dataset(pyarrow.table(columns), fingerprint="examples")


def _read_on_demand(samples: EncodedSamples) -> Dataset:
    """Return a data set of positions, which are replaced by their examples when they are read."""

    def read(batch: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
        positions = batch["input_ids"]
        return {
            "input_ids": [samples.input_ids[position] for position in positions],
            "labels": [samples.labels[position] for position in positions],
        }

    positions = list(range(len(samples.input_ids)))
    dataset: Dataset = Dataset.from_dict({"input_ids": positions, "labels": positions})
    dataset.set_transform(read)
    return dataset


def is_blank(inputs: Mapping[str, Any]) -> bool:
    """Return whether a batch has blank rows alone; waits for the device."""
    return bool((inputs["labels"] == IGNORED).all())


def check_strategy(strategy: str) -> None:
    """Check that the order of the examples does not depend on the number of processes.

    Raises:
        InputError: It does.
    """
    if strategy not in _STRATEGIES:
        raise InputError(
            f"Invalid training_args.train_sampling_strategy={strategy} with several processes. "
            f"Must be one of {', '.join(_STRATEGIES)}."
        )


class FilledSampler(Sampler[int]):
    """Indices of the examples in the order of one process, then of the blank row up to a multiple.

    Args:
        count: Number of examples; the blank row has this index.
        multiple: Number of rows that all processes take together.
        is_random: Whether to draw an order in each epoch, as accelerate does for one process.
        seed: Seed of the order; None for torch's.
    """

    def __init__(self, count: int, multiple: int, *, is_random: bool, seed: int | None) -> None:
        self._count = count
        self._blank = -count % multiple
        self._order = SeedableRandomSampler(range(count), data_seed=seed) if is_random else None

    def __len__(self) -> int:
        return self._count + self._blank

    def __iter__(self) -> Iterator[int]:
        yield from self._order or range(self._count)
        yield from [self._count] * self._blank

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the order depends."""
        if self._order is not None:
            self._order.set_epoch(epoch)


class WithoutBlankRows:
    """Makes batches without blank rows, unless there are no others.

    Args:
        collate: Makes a batch of rows.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Return the batch of the rows."""
        return self._collate([row for row in rows if row["labels"] != _BLANK["labels"]] or rows[:1])
