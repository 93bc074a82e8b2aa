"""Conversion of samples to token ids and labels, the same in training and in evaluation."""

from __future__ import annotations

import itertools
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from molf.data.rows import Rows, lengths_of
from molf.data.samples import Rendered, Sample, Span
from molf.errors import InputError
from molf.measure.tokens import IGNORED, TokenizedText, check_tokenizer, tokenize

Show = Callable[[int, int], None]
"""Called with the number of samples that are done, and that of all."""

PART = 1000
"""Samples that are encoded between two calls of `show`."""

_AT_ONCE = 100  # bounds the memory of texts and of their tokens' places, 200 bytes per token


class TokenizedSample(NamedTuple):
    """A sample's tokens, and its text with the spans of prompt and answer."""

    text: TokenizedText
    rendered: Rendered


@dataclass(frozen=True)
class GenerationContext:
    """The tokens from which a sample's answer is generated.

    Attributes:
        prompt: The prompt's text.
        ids: The tokens that precede the answer in training.
        missing: The end of the prompt that `ids` lacks, usually empty. The prompt's last
            characters may share a token with the answer (often after a prompt that ends in a
            space); the model then generates that token.
        text: The whole sample, prompt and answer.
        answer_tokens: Number of tokens of the answer.
    """

    prompt: str
    ids: list[int]
    missing: str
    text: TokenizedText
    answer_tokens: int


@dataclass(frozen=True)
class EncodedSamples:
    """Samples ready for a trainer: rows of ids and labels, without padding.

    Attributes:
        input_ids: Token ids of each kept sample.
        labels: Per token its id where it carries loss, -100 elsewhere (not shifted).
        kept: Positions of the kept samples among those given.
        left_out: Number of samples longer than `max_length`.
        longest: The longest sample in tokens, those left out included; of the tokenized ones.
        faults: Number of tokenized kept samples that differ from their records, by a sentence
            about it.
        known: Token ids of the samples that are tokenized, if others are tokenized when they are
            read (`molf.data.on_demand`); None if all are.
        records_hash: Hash of the records of the kept samples, if not all are tokenized.
        source: A line about the file of the tokens; empty for none (`molf.data.tokens.cache`).
    """

    input_ids: Sequence[list[int]]
    labels: Sequence[list[int]]
    kept: Sequence[int]
    left_out: int
    longest: int
    faults: Counter[str] = field(default_factory=Counter)
    known: Sequence[list[int]] | None = None
    records_hash: str = ""
    source: str = ""

    @property
    def tokenized(self) -> Sequence[list[int]]:
        """Token ids of the samples that are tokenized."""
        return self.input_ids if self.known is None else self.known

    def lengths(self) -> list[int]:
        """Return the number of tokens of each kept sample; tokenizes those that are not yet."""
        return lengths_of(self.input_ids)


def tokenize_samples(tokenizer: Any, samples: Sequence[Sample]) -> Iterator[TokenizedSample]:
    """Render and tokenize samples, prompt and answer as one text.

    Raises:
        InputError: The tokenizer cannot be used.
    """
    check_tokenizer(tokenizer)
    for start in range(0, len(samples), _AT_ONCE):
        rendered = [sample.render(tokenizer) for sample in samples[start : start + _AT_ONCE]]
        tokenized: dict[int, TokenizedText] = {}  # by position
        for literal in (None, ()):
            group = [i for i, item in enumerate(rendered) if item.literal == literal]
            texts = [rendered[i].text for i in group]
            found = tokenize(tokenizer, texts, from_template=literal is not None)
            tokenized.update(zip(group, found, strict=True))
        for position, item in enumerate(rendered):
            if item.literal:
                tokenized[position] = _tokenize_around(tokenizer, item.text, item.literal)
            yield TokenizedSample(tokenized[position], item)


def _tokenize_around(tokenizer: Any, text: str, literal: Sequence[Span]) -> TokenizedText:
    """Tokenize a text; control tokens in its `literal` parts are read as plain text.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        literal: Start and end of the plain parts, in order.
    """
    cuts = [0, *(cut for span in literal for cut in span), len(text)]
    whole = tokenize(tokenizer, [text[: cuts[1]]], from_template=True)[0]
    for position, (start, end) in enumerate(itertools.pairwise(cuts[1:])):
        # SentencePiece adds a space at the start of a text, but none before a line break.
        piece = tokenizer(
            "\n" + text[start:end],
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=position % 2 == 0,
        )
        for token, (low, high) in zip(piece["input_ids"], piece["offset_mapping"], strict=True):
            if high > 1:  # skip the token of the line break
                whole.ids.append(token)
                whole.starts.append(start + max(low - 1, 0))
                whole.ends.append(start + high - 1)
    return whole


def encode_samples(
    tokenizer: Any,
    samples: Sequence[Sample],
    max_length: int,
    show: Show = lambda done, total: None,
) -> EncodedSamples:
    """Encode samples for training: `tokenize_samples`, then `encode_tokenized`.

    `show` is called with the number of encoded samples, and that of all.

    Warns:
        UserWarning: Samples differ from their records, such as turns that carry no loss.
    """
    encoded = encode_quietly(tokenizer, samples, max_length, show)
    warn_of_faults(encoded)
    return encoded


def encode_quietly(
    tokenizer: Any,
    samples: Sequence[Sample],
    max_length: int,
    show: Show = lambda done, total: None,
) -> EncodedSamples:
    """Encode samples as `encode_samples` does, without its warning."""

    def parts() -> Iterator[EncodedSamples]:
        for start in range(0, len(samples), PART):
            show(start, len(samples))
            yield encode_part(tokenizer, samples[start : start + PART], max_length)

    return joined(parts(), max_length)


def warn_of_faults(encoded: EncodedSamples) -> None:
    """Warn of samples that differ from their records, such as turns that carry no loss."""
    for fault, count in encoded.faults.items():
        warnings.warn(f"{count} of {len(encoded.tokenized)} examples: {fault}.", stacklevel=3)


def encode_tokenized(
    tokenizer: Any, samples: Iterable[TokenizedSample], max_length: int
) -> EncodedSamples:
    """Encode samples for training or for measuring their loss.

    A token belongs to the answer when it ends after the prompt's end. Every sample ends with EOS,
    which carries loss; it is added where the text (a chat template's) does not end with it already.
    Samples longer than `max_length` are left out, not cut: a cut answer would train the model to
    stop in the middle.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        samples: The samples, at least one.
        max_length: Longest sample in tokens, BOS and EOS included.

    Raises:
        InputError: All samples are too long.
    """
    return joined([_encoded(tokenizer, samples, max_length)], max_length)


def encode_part(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> EncodedSamples:
    """Encode some samples, of which all may be too long; `joined` joins the parts.

    The arguments and errors are those of `encode_samples`.
    """
    return _encoded(tokenizer, tokenize_samples(tokenizer, samples), max_length)


def _encoded(tokenizer: Any, samples: Iterable[TokenizedSample], max_length: int) -> EncodedSamples:
    ids_of, labels_of, kept = Rows(), Rows(), []
    faults: Counter[str] = Counter()
    count = longest = 0
    for text, rendered in samples:
        ids, labels = ids_and_labels(text, rendered, tokenizer.eos_token_id)
        longest = max(longest, len(ids))
        # Samples that are left out are not trained on, so their faults do not count.
        if len(ids) <= max_length:
            ids_of.append(ids)
            labels_of.append(labels)
            kept.append(count)
            faults.update(rendered.all_faults(tokenizer))
        count += 1
    return EncodedSamples(ids_of, labels_of, kept, count - len(kept), longest, faults)


def joined(parts: Iterable[EncodedSamples], max_length: int) -> EncodedSamples:
    """Join parts of samples in their order, which have all tokens.

    Raises:
        InputError: All samples are longer than `max_length`.
    """
    ids_of, labels_of, kept = Rows(), Rows(), array("q")
    faults: Counter[str] = Counter()
    count = longest = 0
    for part in parts:
        ids_of.extend(part.input_ids)
        labels_of.extend(part.labels)
        kept.extend(count + position for position in part.kept)
        faults.update(part.faults)
        longest = max(longest, part.longest)
        count += len(part.kept) + part.left_out
    if not kept:
        raise InputError(
            f"All {count} samples are longer than max_length={max_length} tokens; "
            f"the longest has {longest}."
        )
    return EncodedSamples(ids_of, labels_of, kept, count - len(kept), longest, faults)


def generation_contexts(
    tokenizer: Any, samples: Iterable[TokenizedSample]
) -> list[GenerationContext]:
    """Return the context from which each sample's last answer is generated."""
    contexts = []
    for text, item in samples:
        prompt = item.text[: item.answer_start]
        ids, answer = text.split(item.answer_start)
        missing = prompt[text.starts[-len(answer)] :] if answer else ""
        if not ids:
            # The first token holds the whole prompt and the start of the answer. The closest
            # possible context is the prompt, tokenized alone.
            alone = tokenize(tokenizer, [prompt], from_template=item.literal is not None)
            ids, missing = alone[0].ids, ""
        contexts.append(GenerationContext(prompt, ids, missing, text, len(answer)))
    return contexts


def ids_and_labels(
    text: TokenizedText, rendered: Rendered, eos_id: int
) -> tuple[list[int], list[int]]:
    """Return a sample's tokens with EOS at the end, and its labels (-100: no loss)."""
    ids = text.prefix + text.ids
    carries = _carry_loss(text.starts, text.ends, rendered.spans)
    labels = [IGNORED] * len(text.prefix)
    labels += [token if one else IGNORED for token, one in zip(text.ids, carries, strict=True)]
    # Without EOS the model would not learn to stop.
    if labels[-1:] != [eos_id]:
        ids, labels = [*ids, eos_id], [*labels, eos_id]
    return ids, labels


def _carry_loss(starts: Sequence[int], ends: Sequence[int], spans: Sequence[Span]) -> list[bool]:
    """Return whether each token ends inside a span, or starts inside a span and ends after it.

    Args:
        starts: Start of each token.
        ends: End of each token.
        spans: The spans, in order; they do not overlap.
    """
    lows, highs = np.array(spans).reshape(-1, 2).T
    first, last = np.array(starts, dtype=np.int64), np.array(ends, dtype=np.int64)
    # The first span that ends after the token's start, or with the token if that is empty.
    place = np.searchsorted(highs, np.where(first < last, first + 1, last))
    bounded = np.append(lows, np.iinfo(np.int64).max)
    found: list[bool] = (bounded[place] < last).tolist()
    return found
