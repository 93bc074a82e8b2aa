"""Tokens of whole texts, with the characters that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from molf.errors import InputError

IGNORED = -100
"""The label of a token without loss, as in transformers."""

_TEXTS_AT_ONCE = 1000  # bounds the memory of the character offsets


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


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, split_special_tokens: bool | None = None
) -> list[TokenizedText]:
    """Tokenize whole texts, with BOS exactly as `tokenizer(text)` has it, but never twice.

    A BOS that the text already spells out (chat templates do) takes the place of the tokenizer's
    own. Tokens that the tokenizer adds behind a text are dropped: who needs an EOS says so.

    Args:
        tokenizer: A fast tokenizer with an EOS token.
        texts: The texts.
        split_special_tokens: Whether control tokens that a text spells out are plain text; None
            for the tokenizer's own setting.
    """
    check_tokenizer(tokenizer)
    if split_special_tokens is None:
        split_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    tokenized: list[TokenizedText] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        encoding = tokenizer(
            list(texts[start : start + _TEXTS_AT_ONCE]),
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            truncation=False,
            padding=False,
            verbose=False,
            split_special_tokens=split_special_tokens,
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
