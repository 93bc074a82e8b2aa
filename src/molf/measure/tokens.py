"""Tokens of whole texts, with the characters that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from molf.errors import InputError

IGNORED = -100
"""The label of a token without loss, as in transformers."""

_TEXTS_AT_ONCE = 100  # bounds the memory of the character offsets


@dataclass(frozen=True)
class TokenizedText:
    """A text's tokens with their positions in the text.

    Attributes:
        prefix: Tokens that the tokenizer adds before a text (BOS), often none.
        ids: The text's own tokens.
        starts: Per token of `ids` the index of its first character.
        ends: Per token of `ids` the index after its last character.
    """

    prefix: list[int]
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def split(self, end: int) -> tuple[list[int], list[int]]:
        """Split the tokens before the first one that ends after character `end`.

        The first part starts with the prefix.
        """
        count = sum(1 for _ in takewhile(lambda token_end: token_end <= end, self.ends))
        return self.prefix + self.ids[:count], self.ids[count:]

    def length(self, eos_id: int) -> int:
        """Return the number of tokens with the prefix and an EOS at the end."""
        return len(self.prefix) + len(self.ids) + (self.ids[-1:] != [eos_id])


def check_tokenizer(tokenizer: Any) -> None:
    """Reject tokenizers without character offsets or without an EOS token.

    Raises:
        InputError: The tokenizer is slow (it has no character offsets) or has no EOS token.
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


def other_token(tokenizer: Any, other: Any) -> str | None:
    """Return a sentence on a token with different ids in two tokenizers; None if there is none.

    A token that only one of them has is ignored: tokens are often added to a tuned model's.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    for token, index in ours.items():
        if theirs.get(token, index) != index:
            return f"{token!r} is token {index} of one and {theirs[token]} of the other"
    names = {index: token for token, index in theirs.items()}
    for token, index in ours.items():
        if names.get(index, token) != token:
            return f"token {index} is {token!r} in one and {names[index]!r} in the other"
    return None


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, from_template: bool = False
) -> list[TokenizedText]:
    """Tokenize whole texts with a BOS where `tokenizer(text)` adds one, but never with two.

    Where the text already begins with BOS, the tokenizer's BOS is dropped. Tokens that the
    tokenizer adds after a text are dropped too; the caller adds EOS.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        texts: The texts.
        from_template: Whether a chat template wrote the texts. It writes all control tokens, BOS
            included: none is added, and none is read as plain text.
    """
    check_tokenizer(tokenizer)
    split = not from_template and bool(getattr(tokenizer, "split_special_tokens", False))
    tokenized: list[TokenizedText] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        encoding = tokenizer(
            list(texts[start : start + _TEXTS_AT_ONCE]),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
            add_special_tokens=not from_template,  # as engines do with a conversation
            split_special_tokens=split,
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
    """Separate the text's own tokens from those that the tokenizer has `added` (1) around them."""
    own = [position for position, is_added in enumerate(added) if not is_added]
    first, end = (own[0], own[-1] + 1) if own else (len(ids), len(ids))
    prefix, text_ids = ids[:first], ids[first:end]
    if prefix and text_ids[:1] == prefix[-1:]:
        prefix = prefix[:-1]
    starts = [start for start, _ in offsets[first:end]]
    ends = [token_end for _, token_end in offsets[first:end]]
    return TokenizedText(prefix, text_ids, starts, ends)
