"""Control tokens that occur as text in a user's records, such as `</s>` in a page of HTML."""

from __future__ import annotations

import re
import weakref
from typing import Any

from molf.shown import map_texts

_MARK = "\ue000"  # from Unicode's private use area: in no tokenizer's vocabulary

_patterns: weakref.WeakKeyDictionary[Any, re.Pattern[str]] = weakref.WeakKeyDictionary()


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the tokenizer's special tokens, the longest first."""
    if tokenizer not in _patterns:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {token.content for token in added if token.special}
        special |= set(tokenizer.all_special_tokens)
        longest_first = sorted(special - {""}, key=len, reverse=True)
        _patterns[tokenizer] = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    return _patterns[tokenizer]


def marked(tokenizer: Any, value: Any) -> Any:
    """Mark the control tokens in all texts of a value, so that `unmarked` finds them again.

    The mark is inserted inside the token, so that a template treats the token as plain text.
    Marks that the texts already contain are removed.
    """
    pattern = control_tokens(tokenizer)

    def mark(text: str) -> str:
        text = text.replace(_MARK, "")
        return pattern.sub(lambda token: token[0][0] + _MARK + token[0][1:], text)

    return map_texts(value, mark)


def unmarked(tokenizer: Any, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text without marks, and the spans of the marked control tokens in it."""
    plain = text.replace(_MARK, "")
    tokens = []
    for count, found in enumerate(re.finditer(_MARK, text)):
        token = control_tokens(tokenizer).match(plain, found.start() - count - 1)
        if token is not None:  # None: the template changed the token's text
            tokens.append(token.span())
    return plain, tuple(tokens)


def without_marks(text: str, position: int) -> int:
    """Convert a position in a marked text to the position after the marks are removed."""
    return position - text.count(_MARK, 0, position)
