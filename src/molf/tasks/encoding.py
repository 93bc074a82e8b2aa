"""From texts to token ids and labels, the same way in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from molf.errors import InputError
from molf.tasks.samples import Rendered, Sample

IGNORED = -100
"""The label of a token without loss, as in transformers."""

_TEXTS_AT_ONCE = 1000  # bounds the memory that offsets take


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens with the characters that they stand for.

    Attributes:
        prefix: Tokens that the tokenizer itself puts in front of a text (BOS), often none.
        ids: The text's own tokens.
        starts: Per token of `ids` the first of its characters in the text.
        ends: Per token the end of its characters.
    """

    prefix: list[int]
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def split(self, end: int) -> tuple[list[int], list[int]]:
        """The tokens up to the first one that reaches past character `end`, and those from it on.

        The former start with the prefix.
        """
        count = sum(1 for _ in takewhile(lambda token_end: token_end <= end, self.ends))
        return self.prefix + self.ids[:count], self.ids[count:]

    def length(self, eos_id: int) -> int:
        """Tokens of a sample with this text: with the prefix, and ending with EOS."""
        return len(self.prefix) + len(self.ids) + (self.ids[-1:] != [eos_id])


class TokenizedSample(NamedTuple):
    """A sample's tokens, and its text with what is prompt and what is answer."""

    text: TokenizedText
    rendered: Rendered


@dataclass(frozen=True)
class GenerationContext:
    """What a sample's answer is generated from.

    Attributes:
        prompt: The prompt's text.
        ids: The tokens that precede the answer in training.
        missing: The end of the prompt that they lack, usually nothing. Where the prompt's last
            characters share a token with the answer (after a prompt that ends in a space they
            often do), that token is the model's to generate.
        text: The whole sample, prompt and answer.
    """

    prompt: str
    ids: list[int]
    missing: str
    text: TokenizedText


@dataclass(frozen=True)
class EncodedSamples:
    """Samples ready for a trainer: rows of ids and labels, without padding.

    Attributes:
        input_ids: Token ids of each kept sample.
        labels: Per token its id where it carries loss, -100 elsewhere (not shifted).
        kept: Positions of the kept samples among those given.
        left_out: How many samples were longer than `max_length`.
        longest: The longest sample in tokens, those left out included.
    """

    input_ids: list[list[int]]
    labels: list[list[int]]
    kept: list[int]
    left_out: int
    longest: int


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse tokenizers that texts cannot be aligned or ended with.

    Raises:
        InputError: The tokenizer is a slow one (no character offsets) or has no EOS token.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"The tokenizer of {name} gives no character offsets (it is a slow tokenizer). "
            "Use a model with a fast tokenizer (tokenizer.json)."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer of {name} has no EOS token, so no answer could ever end. "
            "Set eos_token in its tokenizer_config.json."
        )


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[TokenizedText]:
    """Tokenize whole texts, with BOS exactly as `tokenizer(text)` has it, but never twice.

    A BOS that the text already spells out (chat templates do) takes the place of the tokenizer's
    own. Tokens that the tokenizer adds behind a text are dropped: who needs an EOS says so.
    """
    check_tokenizer(tokenizer)
    tokenized = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        encoding = tokenizer(
            list(texts[start : start + _TEXTS_AT_ONCE]),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
        )
        for ids, offsets, added in zip(
            encoding["input_ids"],
            encoding["offset_mapping"],
            encoding["special_tokens_mask"],
            strict=True,
        ):
            tokenized.append(_split_added(ids, offsets, added))
    return tokenized


def _split_added(ids: list[int], offsets: list[tuple[int, int]], added: list[int]) -> TokenizedText:
    """Separate the text's own tokens from those `added` (1) in front of and behind them."""
    own = [position for position, is_added in enumerate(added) if not is_added]
    first, end = (own[0], own[-1] + 1) if own else (len(ids), len(ids))
    prefix, text_ids = ids[:first], ids[first:end]
    if prefix and text_ids[:1] == prefix[-1:]:
        prefix = prefix[:-1]
    starts = [start for start, _ in offsets[first:end]]
    ends = [token_end for _, token_end in offsets[first:end]]
    return TokenizedText(prefix, text_ids, starts, ends)


def tokenize_samples(tokenizer: Any, samples: Sequence[Sample]) -> Iterator[TokenizedSample]:
    """Render and tokenize samples; prompt and answer together, as the model meets them.

    Raises:
        InputError: The tokenizer cannot be used.
    """
    check_tokenizer(tokenizer)
    for start in range(0, len(samples), _TEXTS_AT_ONCE):
        rendered = [sample.render(tokenizer) for sample in samples[start : start + _TEXTS_AT_ONCE]]
        tokenized = tokenize(tokenizer, [item.text for item in rendered])
        yield from map(TokenizedSample, tokenized, rendered)


def encode_samples(tokenizer: Any, samples: Sequence[Sample], max_length: int) -> EncodedSamples:
    """Encode samples for training: `tokenize_samples`, then `encode_tokenized`."""
    return encode_tokenized(tokenizer, tokenize_samples(tokenizer, samples), max_length)


def encode_tokenized(
    tokenizer: Any, samples: Iterable[TokenizedSample], max_length: int
) -> EncodedSamples:
    """Encode samples for training or for measuring their loss.

    A token belongs to the answer when it ends after the prompt's end. Every sample ends with EOS,
    which carries loss; it is added where the text (a chat template's) does not end with it already.
    Samples longer than `max_length` are left out whole: a cut answer would teach the model to stop
    in the middle.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        samples: The samples, at least one.
        max_length: Longest sample in tokens, BOS and EOS included.

    Raises:
        InputError: All samples are too long.
    """
    rows = [_ids_and_labels(item.text, item.rendered, tokenizer.eos_token_id) for item in samples]
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
    )


def generation_contexts(
    tokenizer: Any, samples: Iterable[TokenizedSample]
) -> list[GenerationContext]:
    """The context to generate each sample's last answer from."""
    contexts = []
    for text, item in samples:
        prompt = item.text[: item.answer_start]
        ids, answer = text.split(item.answer_start)
        missing = prompt[text.starts[-len(answer)] :] if answer else ""
        if not ids:
            # A single token holds the whole prompt and some of the answer, and nothing precedes
            # it: the prompt on its own is the closest to it that can be asked.
            ids, missing = tokenize(tokenizer, [prompt])[0].ids, ""
        contexts.append(GenerationContext(prompt, ids, missing, text))
    return contexts


def _ids_and_labels(
    text: TokenizedText, rendered: Rendered, eos_id: int
) -> tuple[list[int], list[int]]:
    ids = text.prefix + text.ids
    labels = [IGNORED] * len(text.prefix)
    for token, start, end in zip(text.ids, text.starts, text.ends, strict=True):
        labels.append(token if _carries_loss(start, end, rendered.spans) else IGNORED)
    if labels[-1:] != [eos_id]:
        ids, labels = [*ids, eos_id], [*labels, eos_id]
    return ids, labels


def _carries_loss(start: int, end: int, spans: tuple[tuple[int, int], ...]) -> bool:
    """Whether a token ends inside a span, or reaches from inside a span past its end."""
    return any(low < end and (end <= high or start < high) for low, high in spans)
