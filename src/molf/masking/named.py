"""Mask values after a secret name: `password=...`, `--api-key ...`, `"token": "..."`."""

from __future__ import annotations

import re

from molf.masking.addresses import MASK
from molf.masking.names import is_secret_in_query, is_secret_name, is_secret_of_any_form

_HEADERS = (
    re.compile(
        r"(?i)(?<![\w-])((?:proxy-)?authorization[\"'\\]*\s*[:=]\s*[\"'\\]*"
        r"(?:(?:apikey|basic|bearer|digest|negotiate|token|aws4-hmac-sha256)\s+)?+)"
        r"(?!\*{3})[^\s\"'\\]+"
    ),
    re.compile(r"(?i)(?<![\w-])(bearer\s+)(?=[^\s\"']*\d)[\w.~+/=-]{8,}"),
    re.compile(r"(?i)(?<![\w-])((?:set-)?cookie[\"'\\]*:\s*[\"'\\]*)(?=[\w-]+=)[^\r\n\"'\\]+"),
    re.compile(r"(?i)(?<![\w-])(auth\s*=\s*)\([^)\n]{0,200}\)"),  # a pair of name and password
    re.compile(
        r"(?i)(?<![\w-])((?:api|access|account|auth|private|secret|signing) (?:key|token)"
        r"(?: id| provided)?\s*[:=]\s*)(?!\*{3})[^\s,;\"']+"
    ),
)
_NAME = re.compile(
    r"(?<![\w.-])(?P<lead>[?&]|--|\\?[\"'](?:--)?)?(?P<name>[A-Za-z_](?:[\w.-]{0,79}[\w-])?)"
    r"(?P<sep>\\?[\"']?\s*(?::=|=>|->|=)\s*|\\?[\"']\s*:\s*|\s?:\s*|\\?[\"']?,?\s+)"
)
# A secret name in the query of an address that is URL-encoded inside another address.
_ENCODED = re.compile(r"(?i)((?:%3f|%26)([\w.-]{1,80}?)%3d)((?:(?!%26)[^\s&\"'<>])+)")
_QUOTED = re.compile(r"(\\?[\"'])([^\n]{0,1000}?)\1(?!\w)")
_QUOTE = re.compile(r"(?:\\?[\"'])?")
_PLAIN = re.compile(r"(?:(?!,\s*[\w-]+=)[^\s&;\"'<>])+")
_LOOKED_AT = 200  # leading characters of a value that are searched for a digit
_AFTER = ".,:;!)]}"
_NUMBER = re.compile(r"-?\d{0,7}(?:\.\d+)?(?:e-?\d+)?")
# Values after a name in source code, which tracebacks quote, such as a call.
_CODE = re.compile(
    r"None|True|False|null|true|false|\*{3}|[A-Za-z_][\w.]*[(\[].*|(?:args|os|self)\..*"
    r"|Any|bool|bytes|dict|float|int|str"
)
_PROSE = re.compile("a|an|and|as|at|by|cannot|for|from|in|is|must|of|on|or|takes|the|to|with")


def mask_named(text: str) -> str:
    """Return the text with the values of names such as `password` masked."""
    for header in _HEADERS:
        text = header.sub(rf"\g<1>{MASK}", text)
    text = _ENCODED.sub(
        lambda found: f"{found[1]}{MASK}" if is_secret_in_query(found[2]) else found[0], text
    )
    parts: list[str] = []
    end = plain_end = 0
    for found in _NAME.finditer(text):
        if found.start() < end or not _is_secret(found):
            continue
        quoted = _QUOTED.match(text, found.end())
        if quoted is not None:
            quote, given = quoted.groups()
        else:
            # No closing quotation mark, or one far away: mask up to the end of the word.
            opening = _QUOTE.match(text, found.end())
            quote = opening[0] if opening else ""
            start = found.end() + len(quote)
            # Matched once per value: matching again at each name inside it is quadratic in time.
            if start >= plain_end:
                plain = _PLAIN.match(text, start)
                plain_end = start if plain is None else plain.end()
            given = text[start:plain_end].rstrip(_AFTER)
        if not given or _is_ordinary(found, given, is_quoted=bool(quote)):
            continue
        parts += (text[end : found.end()], quote, MASK)
        end = found.end() + len(quote) + len(given)
    return "".join((*parts, text[end:]))


def _is_secret(found: re.Match[str]) -> bool:
    name = found["name"]
    lead = found["lead"] or ""
    if not set(found["sep"]) & set(":=-") and not lead.endswith("--"):
        return False  # only a space after a word: prose
    if lead in ("?", "&"):
        return is_secret_in_query(name)
    return is_secret_name(name) or (lead.endswith("--") and name == "key")


def _is_ordinary(found: re.Match[str], value: str, *, is_quoted: bool) -> bool:
    """Return whether a value cannot be a secret, such as a number of tokens, or source code."""
    name, lead, sep = found["name"], found["lead"] or "", found["sep"]
    if value == MASK:
        return True
    if lead.endswith("--"):
        return "=" not in sep and (value.startswith("-") or _PROSE.fullmatch(value) is not None)
    if name.lower() in ("pwd", "oldpwd") and value.startswith("/"):
        return True  # the working directory
    if is_secret_of_any_form(name):
        return not is_quoted and _is_code(value)
    if _NUMBER.fullmatch(value) or (not is_quoted and _is_code(value)):
        return True
    # In prose, such as "token: the", only a long value with a digit is taken for a secret.
    is_prose = ":" in sep and not lead and not is_quoted
    return is_prose and not (len(value) >= 8 and re.search(r"\d", value[:_LOOKED_AT]) is not None)


def _is_code(value: str) -> bool:
    return _CODE.fullmatch(value) is not None or (
        re.fullmatch(r"[A-Za-z_]+(?:\.[A-Za-z_]+)*", value) is not None and is_secret_name(value)
    )
