"""Rows of token ids in one compact array."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload


class Rows(Sequence[list[int]]):
    """Rows of integers that fit in 32 bits, at 4 bytes each; a row is returned as a new list.

    A list of lists takes ten times the memory: each integer is an object.

    Args:
        rows: The first rows.
    """

    def __init__(self, rows: Iterable[Sequence[int]] = ()) -> None:
        self._values: Any = array("i")
        self._ends: Any = array("q", (0,))
        for row in rows:
            self.append(row)

    def append(self, row: Sequence[int]) -> None:
        """Add a row at the end."""
        self._values.extend(row)
        self._ends.append(len(self._values))

    @classmethod
    def of_arrow(cls, column: Any) -> Rows:
        """Return the rows of an Arrow array that `as_arrow` returned; they share its memory."""
        rows = cls()
        rows._values = column.values.to_numpy()
        rows._ends = column.offsets.to_numpy().astype("int64")
        return rows

    def extend(self, rows: Iterable[Sequence[int]]) -> None:
        """Add rows at the end."""
        if not isinstance(rows, Rows):
            for row in rows:
                self.append(row)
            return
        start = len(self._values)
        self._values.extend(rows._values)
        self._ends.extend(start + end for end in rows._ends[1:])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row: list[int] = self._values[self._ends[place] : self._ends[place + 1]].tolist()
        return row

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rows):
            return bytes(self._ends) == bytes(other._ends) and bytes(self._values) == bytes(
                other._values
            )
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def lengths(self) -> list[int]:
        """Return the length of each row."""
        return [end - start for start, end in itertools.pairwise(self._ends.tolist())]

    def as_arrow(self) -> Any:
        """Return the rows as an Arrow array of lists, which shares their memory."""
        import numpy as np
        import pyarrow

        values = pyarrow.array(np.frombuffer(self._values, dtype=np.int32))
        ends = np.frombuffer(self._ends, dtype=np.int64)
        if len(values) < 2**31:
            return pyarrow.ListArray.from_arrays(ends.astype(np.int32), values)
        return pyarrow.LargeListArray.from_arrays(ends, values)


def lengths_of(rows: Sequence[list[int]]) -> list[int]:
    """Return the length of each row, without reading those of `Rows`."""
    return rows.lengths() if isinstance(rows, Rows) else [len(row) for row in rows]


def largest_of(rows: Sequence[list[int]]) -> int:
    """Return the largest integer of all rows, of which none is empty."""
    import numpy as np

    if isinstance(rows, Rows):
        return int(np.frombuffer(rows._values, dtype=np.int32).max())
    return max(map(max, rows))
