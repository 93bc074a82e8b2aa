"""Extraction of SQL from generated text by lexical rules, without a parser.

Quoted text ('...', "...", `...`, [...]) and comments (-- and /* */) are skipped by SQLite's rules,
so that a `;` or a parenthesis inside them has no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    (?P<fence> ``` )
    | (?P<skipped> '[^']*(?:'|\Z) | "[^"]*(?:"|\Z) | `[^`]*(?:`|\Z) | \[[^\]]*(?:\]|\Z)
                 | --[^\n]* | /\*.*?(?:\*/|\Z) )
    | (?P<semicolon> ; )
    | (?P<open> \( )
    | (?P<close> \) )
    | (?P<word> \w+ )
    """,
    re.VERBOSE | re.DOTALL,
)
_WORD = re.compile(r"\w+")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_COMMENTS = re.compile(r"(?:\s|--[^\n]*|/\*.*?(?:\*/|\Z))*", re.DOTALL)
_SQL_START = re.compile(
    r"(?:select|with|insert|replace|update|delete|create|alter|drop|values|explain|pragma|analyze|"
    r"attach|detach|begin|vacuum|reindex)\b|--|/\*|\(",
    re.IGNORECASE,
)
# An opening fence with the language's name on its line ("sql" may also be followed by the query).
_OPENING = re.compile(r"```[ \t]*(?:(?:sql|sqlite)\b|\w+(?=[ \t]*\r?\n))?", re.IGNORECASE)
_TAGGED_OPENING = re.compile(r"```[ \t]*(?:(?:sql|sqlite)\b|\w+[ \t]*\r?\n)", re.IGNORECASE)
_CLOSED = re.compile(r"```[ \t]*\r?[^\w \t\r]")


def first_statement(text: str) -> str:
    """Return the first statement of a generated text.

    The text is cut at the first `;` outside quotes and comments, or at the first blank line, and
    trimmed. If a fenced code block comes first or after introductory words, its inside is used.
    Blank lines before the first word of the statement (around comments) do not count.
    """
    return _scan(text).statement


def is_complete(text: str) -> bool:
    """Return whether more text cannot change `first_statement`, so that generation can stop.

    It takes microseconds for a text of generated length. Words other than SQL may introduce a code
    block, so such a text is complete only when the block or its statement ends.
    """
    return _scan(text).complete


def has_outer_order(query: str) -> bool:
    """Return whether a query orders its rows: ORDER BY outside parentheses."""
    depth = 0
    before = ""
    for match in _TOKEN.finditer(query):
        kind, token = match.lastgroup, match[0].upper()
        if kind == "open":
            depth += 1
        elif kind == "close":
            depth -= 1
        elif kind == "word":
            if depth == 0 and before == "ORDER" and token == "BY":
                return True
            before = token
        elif kind != "skipped" or not token.startswith(("--", "/*")):
            before = ""
    return False


def first_word(query: str) -> str:
    """Return the first word of a statement in upper case; empty where there is none."""
    query = query.removeprefix("\ufeff")  # a byte order mark, which SQLite skips
    match = _WORD.match(query, _code_start(query))
    return match[0].upper() if match else ""


@dataclass(frozen=True)
class _Scan:
    statement: str
    complete: bool


def _scan(text: str) -> _Scan:
    text = text.lstrip()
    # A text that begins with SQL is no introduction of a code block.
    if _SQL_START.match(text):
        return _cut(text, in_block=False)
    opening = _OPENING.search(text)
    if opening is not None:
        return _cut(text[opening.end() :].lstrip(), in_block=True)
    return _Scan(_cut(text, in_block=False).statement, complete=False)


def _cut(text: str, *, in_block: bool) -> _Scan:
    """Cut at the first `;`, blank line or fence; after an opening fence, continue in the block."""
    blank = _BLANK_LINE.search(text, _code_start(text))
    end = len(text) if blank is None else blank.start()
    for kind, start in _ends(text[:end]):
        complete = True
        if kind == "fence" and not in_block:
            opening = _TAGGED_OPENING.match(text, start)
            if opening is not None:
                return _cut(text[opening.end() :].lstrip(), in_block=True)
            # The fence may still open a block: a language's name can follow.
            complete = _CLOSED.match(text, start) is not None
        return _Scan(text[:start].strip(), complete=complete)
    return _Scan(text[:end].strip(), complete=blank is not None)


def _ends(text: str) -> Iterator[tuple[str, int]]:
    for match in _TOKEN.finditer(text):
        if match.lastgroup in ("semicolon", "fence"):
            yield str(match.lastgroup), match.start()


def _code_start(text: str) -> int:
    match = _COMMENTS.match(text)
    return match.end() if match else 0
