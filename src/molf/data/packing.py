"""Rows of several whole examples, by TRL's best-fit decreasing packing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

_AT_ONCE = 10_000  # examples; bounds the memory, of which Arrow takes 12 bytes per token
_MOST_IN_LIST = 2**31 - 1  # offsets of a `ListArray`


def pack(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Return the positions of the examples in each row.

    The longest examples come first; each goes into the fullest row that has room for it.

    Args:
        lengths: Tokens of each example, at least 1 and at most `most`.
        most: Most tokens of a row.
    """
    import numpy as np
    import pyarrow
    from datasets import Dataset
    from trl import pack_dataset

    ends = np.cumsum([0, *lengths])
    tokens = int(ends[-1])
    # TRL packs lists of tokens. It needs their lengths alone, so these tokens take a byte each.
    values = pyarrow.array(np.zeros(tokens, dtype=np.int8))
    if tokens <= _MOST_IN_LIST:
        column = pyarrow.ListArray.from_arrays(ends.astype(np.int32), values)
    else:
        column = pyarrow.LargeListArray.from_arrays(ends, values)
    # Without a fingerprint of our own, `datasets` would hash all values.
    examples = Dataset(pyarrow.table({"tokens": column}), fingerprint="examples")
    packed = pack_dataset(
        examples,
        min(most, tokens),  # TRL's search tree has this size
        "bfd",
        {"batch_size": _AT_ONCE, "new_fingerprint": "packed"},
    )
    # Examples of one length are interchangeable; each is taken in turn.
    positions: dict[int, list[int]] = defaultdict(list)
    for position in reversed(range(len(lengths))):
        positions[lengths[position]].append(position)
    rows: list[list[int]] = packed.with_format("arrow")[:]["seq_lengths"].to_pylist()
    return [[positions[length].pop() for length in row] for row in rows]
