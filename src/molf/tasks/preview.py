"""Training records as the model will see them: tokens, and the text with loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from molf.data.encoding import ids_and_labels, tokenize_samples
from molf.measure.tokens import IGNORED
from molf.tasks.base import DataRecords

_AT_ONCE = 1000

NOT_DRAWN = "not drawn by max_samples"
NOT_WEIGHTED = "not drawn by max_samples or the weight of its file"


@dataclass(frozen=True)
class PreviewedRecord:
    """A record as it is encoded for training.

    Attributes:
        index: 0-based record of the data file.
        tokens: Number of tokens, BOS and EOS included.
        loss_tokens: Number of tokens that carry loss.
        segments: The decoded text in order, as (part, whether the part carries loss).
        held_out: Whether the record is kept for evaluation.
        left_out: Why the record is not used; None if it is trained on or held out.
        faults: Sentences about differences between text and record.
        times: Number of times that an epoch has the record, if it is trained on.
    """

    index: int
    tokens: int
    loss_tokens: int
    segments: list[tuple[str, bool]]
    held_out: bool
    left_out: str | None
    faults: tuple[str, ...]
    times: int = 1


def preview(tokenizer: Any, data: DataRecords, max_length: int) -> Iterator[PreviewedRecord]:
    """Encode all usable records of the data file, in order, as in training.

    Args:
        tokenizer: The model's tokenizer.
        data: The records.
        max_length: Longest example in tokens.

    Raises:
        InputError: The tokenizer cannot be used, or its chat template rejects a record.
    """
    held_out, trained_on = set(data.held_out), Counter(data.trained_on)
    indices = list(data.samples)
    for start in range(0, len(indices), _AT_ONCE):
        chunk = indices[start : start + _AT_ONCE]
        tokenized = tokenize_samples(tokenizer, [data.samples[index] for index in chunk])
        for index, (text, rendered) in zip(chunk, tokenized, strict=True):
            ids, labels = ids_and_labels(text, rendered, tokenizer.eos_token_id)
            left_out = None
            if len(ids) > max_length:
                left_out = f"longer than {max_length} tokens"
            elif index not in held_out and index not in trained_on:
                left_out = NOT_WEIGHTED if data.is_weighted else NOT_DRAWN
            yield PreviewedRecord(
                index=index,
                tokens=len(ids),
                loss_tokens=sum(label != IGNORED for label in labels),
                segments=_segments(tokenizer, ids, labels),
                held_out=index in held_out,
                left_out=left_out,
                faults=rendered.all_faults(tokenizer),
                times=trained_on[index] or 1,
            )


def _segments(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """Decode the ids and cut the text where loss begins and ends."""

    def decode(count: int) -> str:
        text: str = tokenizer.decode(
            list(ids[:count]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    carries = [label != IGNORED for label in labels]
    cuts = [i for i in range(1, len(ids)) if carries[i] != carries[i - 1]]
    whole = decode(len(ids))
    segments = []
    end = 0
    for begin, cut in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        before = end
        # A cut inside a character decodes to U+FFFD; the character then goes to the next segment.
        end = len(whole) if cut == len(ids) else max(end, _common_length(decode(cut), whole))
        segments.append((whole[before:end], carries[begin]))
    return segments


def _common_length(text: str, whole: str) -> int:
    """Return the length of the longest common prefix of `text` and `whole`."""
    while not whole.startswith(text):
        text = text[:-1]
    return len(text)
