"""Samples of large data, in a compact form."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from molf.data.samples import Sample
from molf.errors import InputError, reason_of

_MOST_IN_MEMORY = 2**24  # bytes; more go to a temporary file


class SampleStore(Mapping[int, Sample]):
    """Samples by record, each as its bytes; a sample is made anew when it is read.

    As objects, the messages of a short conversation take several times the memory of their texts.
    The bytes of large data are in a temporary file, which is deleted with the store or the process.
    """

    def __init__(self) -> None:
        self._content = _Content()
        self._ends = array("q", (0,))
        self._records = array("q")  # in order

    def add(self, sample: Sample) -> None:
        """Add the sample of a record behind those that are there.

        Raises:
            InputError: The temporary file cannot be written.
        """
        assert not self._records or sample.record > self._records[-1]
        self._records.append(sample.record)
        self._content.append(pickle.dumps(sample, protocol=pickle.HIGHEST_PROTOCOL))
        self._ends.append(len(self._content))

    def __getitem__(self, record: int) -> Sample:
        place = bisect_left(self._records, record)
        if self._records[place : place + 1] != array("q", (record,)):
            raise KeyError(record)
        sample: Sample = pickle.loads(self._content.read(self._ends[place], self._ends[place + 1]))
        return sample

    def __iter__(self) -> Iterator[int]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


class _Content:
    """Bytes that grow at the end: the last ones in memory, the others in a temporary file.

    Reads are not mapped into memory, so that they do not count as memory of the process.
    """

    def __init__(self) -> None:
        self._file: Any = None
        self._written = 0
        self._last = bytearray()
        self._lock = threading.Lock()

    def append(self, content: bytes) -> None:
        self._last += content
        if len(self._last) <= _MOST_IN_MEMORY:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="molf-samples-")  # noqa: SIM115
            self._file.seek(self._written)
            self._file.write(self._last)
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"A temporary file for the records cannot be written: {reason_of(error)}"
                f"{_place()}. Set TMPDIR to a folder with more room."
            ) from error
        self._written += len(self._last)
        self._last = bytearray()

    def read(self, start: int, end: int) -> bytes | memoryview:
        if start >= self._written:
            return memoryview(self._last)[start - self._written : end - self._written]
        if not hasattr(os, "pread"):
            with self._lock:
                self._file.seek(start)
                content: bytes = self._file.read(end - start)
                return content
        # Without a seek: forked processes share the position of the file.
        parts = []
        while start < end and (part := os.pread(self._file.fileno(), end - start, start)):
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __len__(self) -> int:
        return self._written + len(self._last)

    def __getstate__(self) -> bytes:
        """Return all bytes, for a process that does not share the file."""
        return bytes(self.read(0, self._written)) + bytes(self._last)

    def __setstate__(self, content: bytes) -> None:
        self.__init__()  # type: ignore[misc]
        self._last += content


def _place() -> str:
    """Return the folder of temporary files for a message; empty if none can be written."""
    try:
        return f" ({tempfile.gettempdir()})"
    except FileNotFoundError:  # the message of the same error names the folders
        return ""


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
        self._records = array("q", records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._samples[record] for record in self._records[index]]
        return self._samples[self._records[index]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
