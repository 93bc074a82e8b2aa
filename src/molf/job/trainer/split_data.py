"""The rows of a training and their order; each process's share: every row once per epoch.

A row is an example, or several packed ones. The rows of an optimizer step are those that one
process with the same global batch would take.
Processes need equally many batches, so the last ones are filled with blank rows. A blank row has no
label: it adds 0 to the sum of the losses, which is divided by the labels of all processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import pyarrow
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig

from molf.data.encoding import EncodedSamples
from molf.data.rows import Rows
from molf.job.methods import TrainingData
from molf.job.settings.batches import GROUP_BY_LENGTH
from molf.measure.tokens import IGNORED

# Two tokens: the loss leaves out the first.
_BLANK = {"input_ids": [0, 0], "labels": [IGNORED, IGNORED]}


def training_set(data: TrainingData, *, with_blank_row: bool) -> Dataset:
    """Return the rows as the trainer reads them, and perhaps a blank row behind them."""
    samples = data.samples
    if data.packed is not None:
        return _packed(samples, data.packed, with_blank_row=with_blank_row)
    if samples.known is not None:
        count = len(samples.input_ids)

        def read(row: int) -> dict[str, list[int]]:
            if row == count:
                return _BLANK
            return {"input_ids": samples.input_ids[row], "labels": samples.labels[row]}

        return _read_by_position(count + with_blank_row, read)
    columns = {}
    for name, rows in (("input_ids", samples.input_ids), ("labels", samples.labels)):
        parts = [(rows if isinstance(rows, Rows) else Rows(rows)).as_arrow()]
        if with_blank_row:
            parts.append(pyarrow.array([_BLANK[name]], type=parts[0].type))
        columns[name] = pyarrow.chunked_array(parts)
    # Without a fingerprint of our own, `datasets` would hash all values.
    return Dataset(pyarrow.table(columns), fingerprint="examples")


def _packed(
    samples: EncodedSamples, packed: Sequence[Sequence[int]], *, with_blank_row: bool
) -> Dataset:
    """Return a data set of packed rows, whose samples are joined when they are read."""

    def read(row: int) -> dict[str, list[int]]:
        if row == len(packed):
            return {**_BLANK, "seq_lengths": [len(_BLANK["labels"])]}
        ids = [samples.input_ids[position] for position in packed[row]]
        labels = [samples.labels[position] for position in packed[row]]
        return {
            "input_ids": list(chain.from_iterable(ids)),
            "labels": list(chain.from_iterable(labels)),
            "seq_lengths": [len(one) for one in ids],  # positions start again in each
        }

    return _read_by_position(len(packed) + with_blank_row, read)


def _read_by_position(count: int, read: Callable[[int], dict[str, list[int]]]) -> Dataset:
    """Return a data set of positions, which are replaced by their rows when they are read."""

    def read_batch(batch: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
        rows = [read(position) for position in batch["input_ids"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    positions = list(range(count))
    dataset: Dataset = Dataset.from_dict({"input_ids": positions, "labels": positions})
    dataset.set_transform(read_batch)
    return dataset


def is_blank(inputs: Mapping[str, Any]) -> bool:
    """Return whether a batch has blank rows alone; waits for the device."""
    return bool((inputs["labels"] == IGNORED).all())


class LengthGroups(LengthGroupedSampler):
    """Random order in which the examples of a step have similar lengths, the same when resumed.

    transformers' sampler draws from torch's global generator, whose state at the start of an
    epoch a resumed training does not have.

    Args:
        lengths: Tokens of each example.
        step: Examples of an optimizer step.
        seed: Seed of the order.
    """

    def __init__(self, lengths: list[int], step: int, seed: int) -> None:
        super().__init__(step, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._epoch)
        return iter(super().__iter__())

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the order depends."""
        self._epoch = epoch


def order_of(data: TrainingData, arguments: SFTConfig, processes: int) -> Sampler[int] | None:
    """Return the order of the rows in an epoch; None for that of the data.

    Args:
        data: The rows.
        arguments: Those of the trainer, with the strategy.
        processes: Number of processes, which take a step together.
    """
    seed = arguments.data_seed
    if arguments.train_sampling_strategy == "random":
        return SeedableRandomSampler(range(data.rows), data_seed=seed)
    if arguments.train_sampling_strategy != GROUP_BY_LENGTH:
        return None
    step = arguments.train_batch_size * arguments.gradient_accumulation_steps * processes
    return LengthGroups(data.row_lengths(), step, arguments.seed if seed is None else seed)


class FilledSampler(Sampler[int]):
    """Indices of the rows in the order of one process, then of the blank row up to a multiple.

    Args:
        count: Number of rows; the blank one has this index.
        multiple: Number of rows that all processes take together.
        order: Order of the rows in an epoch; None for that of the data.
    """

    def __init__(self, count: int, multiple: int, order: Sampler[int] | None) -> None:
        self._count = count
        self._blank = -count % multiple
        self._order = order

    def __len__(self) -> int:
        return self._count + self._blank

    def __iter__(self) -> Iterator[int]:
        yield from self._order or range(self._count)
        yield from [self._count] * self._blank

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the order depends."""
        if isinstance(self._order, (SeedableRandomSampler, LengthGroups)):
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
