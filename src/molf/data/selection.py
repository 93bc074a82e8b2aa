"""Seeded draws of records; indices always keep the data's order."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence

from molf.errors import InputError

HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 500

_VALIDATION_SEED = 20_261  # fixed, so that the validation part is the same for runs of all seeds


def draw(indices: Sequence[int], maximum: int | None, seed: int) -> list[int]:
    """Draw at most `maximum` of the indices; all for None."""
    if maximum is None or maximum >= len(indices):
        return list(indices)
    # Not torch's generator: the draw must not depend on its version.
    return sorted(random.Random(seed).sample(indices, maximum))


def hold_out(
    indices: Sequence[int], seed: int, content: Callable[[int], Hashable]
) -> tuple[list[int], list[int]]:
    """Split indices into those to train on and a share held out for evaluation.

    Records of the same content are on the same side, so that no evaluated text is trained on. A
    tenth of the different contents is held out, at least 1 and at most 500; with a single content,
    nothing is left to train on.

    Args:
        indices: The records.
        seed: Seed of the draw.
        content: Returns a key of a record's texts, equal for equal texts.
    """
    # Not the seed of `draw`: both draws would use the same random numbers.
    return _split(indices, content, HELD_OUT_SHARE, HELD_OUT_MOST, seed + 1)


def validation_part(
    indices: Sequence[int], share: float, content: Callable[[int], Hashable]
) -> tuple[list[int], list[int]]:
    """Split indices into the rest and the validation part, the same for runs of all seeds.

    Records of the same content are on the same side. With a single content, the rest is empty.

    Args:
        indices: The records.
        share: Share of the different contents in the validation part, at least one of them.
        content: Returns a key of a record's texts, equal for equal texts.
    """
    return _split(indices, content, share, len(indices), _VALIDATION_SEED)


def _split(
    indices: Sequence[int],
    content: Callable[[int], Hashable],
    share: float,
    most: int,
    seed: int,
) -> tuple[list[int], list[int]]:
    """Split indices into the rest and a drawn share of their contents."""
    import numpy as np

    keys = np.frombuffer(b"".join(content_key(content(index)) for index in indices), "S16")
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    firsts = sorted(first.tolist())
    drawn = draw(firsts, min(max(1, round(len(firsts) * share)), most), seed)
    held_out = np.isin(group, group[drawn])
    return (
        [index for index, held in zip(indices, held_out, strict=True) if not held],
        [index for index, held in zip(indices, held_out, strict=True) if held],
    )


def content_key(content: Hashable) -> bytes:
    """Return a hash of 16 bytes of a content, because many contents are as large as the data."""
    text = repr(content).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def weighted(
    indices: Sequence[int], weights: Sequence[tuple[range, float]], seed: int
) -> list[int]:
    """Repeat indices by the weights of their files; sorted, so that repetitions are adjacent.

    Args:
        indices: The records to train on, in order.
        weights: Indices of all records of each file, and its weight. Of the fraction of a weight,
            that share of the file's indices is drawn, at least one index per file.
        seed: Seed of the draws.
    """
    if all(weight == 1 for _, weight in weights):
        return list(indices)
    found: list[int] = []
    for records, weight in weights:
        own = indices[bisect_left(indices, records.start) : bisect_left(indices, records.stop)]
        times = int(weight)
        share = round((weight - times) * len(own)) or (not times and bool(own))
        # Not the seeds of `draw` and `hold_out`.
        found += [*own] * times + draw(own, int(share), seed + 2) if own else []
    return sorted(found)


def required_hold_out(
    indices: Sequence[int],
    seed: int,
    content: Callable[[int], Hashable],
    data: str,
    *,
    preview: bool = False,
) -> tuple[list[int], list[int]]:
    """Split as `hold_out` does; reject data of one content, which a preview accepts.

    Raises:
        InputError: All records have the same content.
    """
    trained_on, held_out = hold_out(indices, seed, content)
    # A preview shows all records, so none needs to be left to evaluate on.
    if not trained_on and preview:
        return held_out, []
    if not trained_on:
        raise InputError(
            f"data: {data} gives {len(indices)} record{'s' * (len(indices) > 1)} of one content, "
            "and none is left to evaluate on. Give more records, or eval_data."
        )
    return trained_on, held_out


def samples_of_runs(
    indices: Sequence[int],
    content: Callable[[int], Hashable],
    *,
    most: int | None,
    most_evaluated: int | None,
    seed: int,
) -> list[list[int]]:
    """Return the sets of records that runs on this data may have held out.

    `--max_samples` of an evaluation may be the run's `--max_samples` or its `--max_eval_samples`.

    Args:
        indices: All usable records.
        content: Returns a key of a record's texts, equal for equal texts.
        most: `max_samples`, or None.
        most_evaluated: `max_eval_samples`, or None.
        seed: Seed of the draws.
    """
    samples = []
    for used, evaluated in dict.fromkeys([(most, most_evaluated), (None, most)]):
        trained_on, held_out = hold_out(draw(indices, used, seed), seed, content)
        if trained_on:
            samples.append(draw(held_out, evaluated, seed))
    return samples
