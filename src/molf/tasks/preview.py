"""The records of a training's data as the model will see them: tokens, and the text with loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from molf.evaluate.tokens import IGNORED
from molf.tasks.base import DataRecords
from molf.tasks.encoding import ids_and_labels, tokenize_samples

_AT_ONCE = 1000

NOT_DRAWN = "not drawn by max_samples"


@dataclass(frozen=True)
class PreviewedRecord:
    """A record as it is trained on.

    Attributes:
        index: 0-based record of the data file.
        tokens: How many tokens it has, BOS and EOS included.
        loss_tokens: How many of them carry loss.
        segments: The decoded tokens in order, in stretches that carry loss or do not.
        held_out: Whether it is kept for evaluation.
        left_out: Why it is neither trained on nor held out; None if it is either.
        faults: Sentences that say how the text differs from the record.
    """

    index: int
    tokens: int
    loss_tokens: int
    segments: list[tuple[str, bool]]
    held_out: bool
    left_out: str | None
    faults: tuple[str, ...]


def preview(tokenizer: Any, data: DataRecords, max_length: int) -> Iterator[PreviewedRecord]:
    """Encode every readable record of the data file, in order, as training does.

    Args:
        tokenizer: The model's tokenizer.
        data: The records.
        max_length: Longest example in tokens.

    Raises:
        InputError: The tokenizer cannot be used, or its chat template refuses a record.
    """
    held_out, trained_on = set(data.held_out), set(data.trained_on)
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
                left_out = NOT_DRAWN
            yield PreviewedRecord(
                index=index,
                tokens=len(ids),
                loss_tokens=sum(label != IGNORED for label in labels),
                segments=_segments(tokenizer, ids, labels),
                held_out=index in held_out,
                left_out=left_out,
                faults=rendered.all_faults(tokenizer),
            )


def _segments(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
    """The decoded ids, cut where loss begins and ends; together they are the whole text."""

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
        # Half of a character at the cut decodes as another one: the whole text has it behind.
        end = len(whole) if cut == len(ids) else max(end, _shared(decode(cut), whole))
        segments.append((whole[before:end], carries[begin]))
    return segments


def _shared(text: str, whole: str) -> int:
    """How many characters of `text` are also the first of `whole`."""
    while not whole.startswith(text):
        text = text[:-1]
    return len(text)
