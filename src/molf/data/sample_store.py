"""Samples of large data, in a compact form."""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molf.data.samples import Sample


class SampleStore(Mapping[int, Sample]):
    """Samples by record, each as its bytes; a sample is made anew when it is read.

    As objects, the messages of a short conversation take several times the memory of their texts.
    """

    def __init__(self) -> None:
        self._content = bytearray()
        self._ends = array("q", (0,))
        self._places: dict[int, int] = {}  # position by record, in order

    def add(self, sample: Sample) -> None:
        """Add the sample of another record, behind the others."""
        self._places[sample.record] = len(self._places)
        self._content += pickle.dumps(sample, protocol=pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(self._content))

    def __getitem__(self, record: int) -> Sample:
        place = self._places[record]
        start, end = self._ends[place], self._ends[place + 1]
        sample: Sample = pickle.loads(memoryview(self._content)[start:end])
        return sample

    def __contains__(self, record: object) -> bool:
        return record in self._places

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class ChosenSamples(Sequence[Sample]):
    """Samples of some records, in the given order.

    Args:
        samples: All samples, by record or by position.
        records: The records or positions; one may come several times.
    """

    def __init__(
        self, samples: Mapping[int, Sample] | Sequence[Sample], records: Sequence[int]
    ) -> None:
        self._samples = samples
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._samples[record] for record in self._records[index]]
        return self._samples[self._records[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
