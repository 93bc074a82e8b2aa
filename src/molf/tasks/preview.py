"""Training records as the model will see them: tokens, and the text with loss."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molf.data.encoding import ids_and_labels, tokenize_samples
from molf.data.samples import Sample
from molf.measure.spread import spread
from molf.measure.tokens import IGNORED
from molf.tasks.base import DataRecords

MOST_CHARACTERS = 4000
"""Characters of one record on a page."""

_AT_ONCE = 1000
_KEPT = 40  # examples of a run
_MOST_TOKENS = 1000  # shown of each of them; each change of loss decodes the text before it

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
        is_validated: Whether it is set aside for evaluations during the training.
        left_out: Why the record is not used; None if it is trained on or held out.
        faults: Sentences about differences between text and record.
        times: Number of times that an epoch has the record, if it is trained on.
    """

    index: int
    tokens: int
    loss_tokens: int
    segments: list[tuple[str, bool]]
    held_out: bool = False
    is_validated: bool = False
    left_out: str | None = None
    faults: tuple[str, ...] = ()
    times: int = 1

    def record(self) -> dict[str, Any]:
        """Return it as an object of JSON; entries without a value are left out."""
        return {
            "index": self.index,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "segments": [list(segment) for segment in self.segments],
            **({"times": self.times} if self.times > 1 else {}),
            **({"held_out": True} if self.held_out else {}),
            **({"validation": True} if self.is_validated else {}),
            **({"left_out": self.left_out} if self.left_out is not None else {}),
            **({"faults": list(self.faults)} if self.faults else {}),
        }

    @property
    def is_trained_on(self) -> bool:
        """Whether the training uses it."""
        return self.left_out is None and not self.held_out and not self.is_validated

    @property
    def state(self) -> str:
        """The use of a record that is not trained on, in words; empty for others."""
        if self.left_out is not None:
            return f"left out: {self.left_out}"
        if self.held_out:
            return "held out to evaluate"
        return "set aside for validation in the training" if self.is_validated else ""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> PreviewedRecord:
        """Return the example of an object that `record` returned.

        Raises:
            KeyError, TypeError, ValueError: The object is another.
        """
        return cls(
            index=int(record["index"]),
            tokens=int(record["tokens"]),
            loss_tokens=int(record["loss_tokens"]),
            segments=[(str(text), bool(has_loss)) for text, has_loss in record["segments"]],
            faults=tuple(map(str, record.get("faults", ()))),
        )

    def cut(self) -> PreviewedRecord:
        """Return it with the first `MOST_CHARACTERS` of its text, and the number of the others."""
        total = sum(len(text) for text, _ in self.segments)
        if total <= MOST_CHARACTERS:
            return self
        segments, left = [], MOST_CHARACTERS
        for text, has_loss in self.segments:
            if left > 0:
                segments.append((text[:left], has_loss))
            left -= len(text)
        segments.append((f" […] ({-left:,} of {total:,} characters more)", False))
        return replace(self, segments=segments)


def examples_of_run(
    tokenizer: Any, samples: Sequence[Sample], kept: Sequence[int]
) -> list[PreviewedRecord]:
    """Return a few examples of a training, spread evenly over its samples, each record once.

    Of a long one, the text of its first tokens is returned.

    Args:
        tokenizer: The model's tokenizer.
        samples: The samples of the training.
        kept: Positions of those that are not too long.
    """
    chosen = [samples[position] for position in spread(kept, _KEPT)]
    # A weight repeats records.
    distinct = {sample.content: sample for sample in chosen}
    return list(_previewed(tokenizer, distinct.values(), _MOST_TOKENS))


def preview(
    tokenizer: Any, data: DataRecords, max_length: int, texts: int | None = None
) -> Iterator[PreviewedRecord]:
    """Encode all usable records of the data file, in order, as in training.

    Args:
        tokenizer: The model's tokenizer.
        data: The records.
        max_length: Longest example in tokens.
        texts: Number of records, from the first, whose segments are decoded; None for all.

    Raises:
        InputError: The tokenizer cannot be used, or its chat template rejects a record.
    """
    held_out, validated_on = set(data.held_out), set(data.validated_on)
    trained_on = Counter(data.trained_on)
    used = held_out | validated_on | trained_on.keys()
    records = _previewed(tokenizer, data.samples.values(), texts=texts)
    for index, record in zip(data.samples, records, strict=True):
        left_out = None
        if record.tokens > max_length:
            left_out = f"longer than {max_length} tokens"
        elif index not in used:
            left_out = NOT_WEIGHTED if data.is_weighted else NOT_DRAWN
        yield replace(
            record,
            index=index,
            held_out=index in held_out,
            is_validated=index in validated_on,
            left_out=left_out,
            times=trained_on[index] or 1,
        )


def _previewed(
    tokenizer: Any,
    samples: Iterable[Sample],
    most: int | None = None,
    texts: int | None = None,
) -> Iterator[PreviewedRecord]:
    """Encode samples as in training.

    Args:
        tokenizer: The tokenizer.
        samples: The samples.
        most: Number of first tokens of each that are decoded; None for all.
        texts: Number of first samples that are decoded; None for all.
    """
    remaining, done = iter(samples), 0
    while chunk := list(itertools.islice(remaining, _AT_ONCE)):
        for sample, (text, rendered) in zip(chunk, tokenize_samples(tokenizer, chunk), strict=True):
            ids, labels = ids_and_labels(text, rendered, tokenizer.eos_token_id)
            segments = []
            if texts is None or done < texts:
                segments = _segments(tokenizer, ids[:most], labels[:most])
                if most is not None and len(ids) > most:
                    more = f" […] ({len(ids) - most:,} of {len(ids):,} tokens more)"
                    segments.append((more, False))
            done += 1
            yield PreviewedRecord(
                index=sample.record,
                tokens=len(ids),
                loss_tokens=sum(label != IGNORED for label in labels),
                segments=segments,
                faults=rendered.all_faults(tokenizer),
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
