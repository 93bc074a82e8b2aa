"""Conversion of samples to token ids and labels, the same in training and in evaluation."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from molf.data.samples import Rendered, Sample, Span
from molf.errors import InputError
from molf.measure.tokens import IGNORED, TokenizedText, check_tokenizer, tokenize

_AT_ONCE = 1000  # bounds the memory of the rendered texts


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
        longest: The longest sample in tokens, those left out included.
        faults: Number of kept samples that differ from their records, by a sentence about it.
    """

    input_ids: list[list[int]]
    labels: list[list[int]]
    kept: list[int]
    left_out: int
    longest: int
    faults: Counter[str] = field(default_factory=Counter)


def tokenize_samples(tokenizer: Any, samples: Sequence[Sample]) -> Iterator[TokenizedSample]:
    """Render and tokenize samples, prompt and answer as one text.

    Raises:
        InputError: The tokenizer cannot be used.
    """
    check_tokenizer(tokenizer)
    for start in range(0, len(samples), _AT_ONCE):
        rendered = [sample.render(tokenizer) for sample in samples[start : start + _AT_ONCE]]
        tokenized: dict[int, TokenizedText] = {}  # by position
        # The tokenizer's setting (None) applies to texts that are wholly the user's; the control
        # tokens that a template writes are kept.
        for literal, split in ((None, None), ((), False)):
            group = [i for i, item in enumerate(rendered) if item.literal == literal]
            texts = [rendered[i].text for i in group]
            found = tokenize(tokenizer, texts, split_special_tokens=split)
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
    whole = tokenize(tokenizer, [text[: cuts[1]]], split_special_tokens=False)[0]
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


def encode_samples(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> EncodedSamples:
    """Encode samples for training: `tokenize_samples`, then `encode_tokenized`.

    Warns:
        UserWarning: Samples differ from their records, such as turns that carry no loss.
    """
    encoded = encode_tokenized(tokenizer, tokenize_samples(tokenizer, samples), max_length)
    for fault, count in encoded.faults.items():
        warnings.warn(f"{count} of {len(encoded.kept)} examples: {fault}.", stacklevel=2)
    return encoded


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
    rows, faults = [], []
    for text, rendered in samples:
        rows.append(ids_and_labels(text, rendered, tokenizer.eos_token_id))
        faults.append(rendered.all_faults(tokenizer))
    longest = max(len(ids) for ids, _ in rows)
    kept = [position for position, (ids, _) in enumerate(rows) if len(ids) <= max_length]
    if not kept:
        raise InputError(
            f"All {len(rows)} samples are longer than max_length={max_length} tokens; "
            f"the longest has {longest}."
        )
    return EncodedSamples(
        input_ids=[rows[position][0] for position in kept],
        labels=[rows[position][1] for position in kept],
        kept=kept,
        left_out=len(rows) - len(kept),
        longest=longest,
        # Samples that are left out are not trained on, so their faults do not count.
        faults=Counter(fault for position in kept for fault in faults[position]),
    )


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
            ids, missing = tokenize(tokenizer, [prompt])[0].ids, ""
        contexts.append(GenerationContext(prompt, ids, missing, text, len(answer)))
    return contexts


def ids_and_labels(
    text: TokenizedText, rendered: Rendered, eos_id: int
) -> tuple[list[int], list[int]]:
    """Return a sample's tokens with EOS at the end, and its labels (-100: no loss)."""
    ids = text.prefix + text.ids
    labels = [IGNORED] * len(text.prefix)
    for token, start, end in zip(text.ids, text.starts, text.ends, strict=True):
        labels.append(token if _carries_loss(start, end, rendered.spans) else IGNORED)
    # Without EOS the model would not learn to stop.
    if labels[-1:] != [eos_id]:
        ids, labels = [*ids, eos_id], [*labels, eos_id]
    return ids, labels


def _carries_loss(start: int, end: int, spans: tuple[Span, ...]) -> bool:
    """Return whether a token ends inside a span, or starts inside a span and ends after it."""
    return any(low < end and (end <= high or start < high) for low, high in spans)
