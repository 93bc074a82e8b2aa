"""Rows of several whole examples, by TRL's best-fit decreasing packing."""

from __future__ import annotations

from collections.abc import Sequence

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
    # TRL packs lists of tokens. Here, each token is the position of its example.
    values = pyarrow.array(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
    if tokens <= _MOST_IN_LIST:
        column = pyarrow.ListArray.from_arrays(ends.astype(np.int32), values)
    else:
        column = pyarrow.LargeListArray.from_arrays(ends, values)
    # Without a fingerprint of our own, `datasets` would hash all values.
    examples = Dataset(pyarrow.table({"examples": column}), fingerprint="examples")
    packed = pack_dataset(
        examples,
        min(most, tokens),  # TRL's search tree has this size
        "bfd",
        {"batch_size": len(lengths), "new_fingerprint": "packed"},  # all examples at once
    )
    rows = packed.with_format("arrow")[:]
    sizes = rows["seq_lengths"].combine_chunks()
    starts = np.cumsum([0, *sizes.flatten().to_numpy()[:-1]])
    positions = rows["examples"].combine_chunks().flatten().to_numpy()[starts]
    return [row.tolist() for row in np.split(positions, np.cumsum(sizes.value_lengths())[:-1])]
