"""Format text of users for Markdown, so that it is never parsed as markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from molf.shown import as_line


def code(text: str) -> str:
    """Return a text as a code span; line breaks and invisible characters are escaped."""
    shown = as_line(text) or " "
    fence = _backticks(shown, 1)
    # CommonMark removes one space at each end of a code span.
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def yaml_block(value: Mapping[str, Any]) -> str:
    """Return values as a fenced block of YAML, with a fence that no value contains."""
    text = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True).strip()
    fence = _backticks(text, 3)
    return f"{fence}yaml\n{text}\n{fence}"


def front_matter(value: Mapping[str, Any]) -> str:
    """Return values as YAML front matter."""
    # YAML indents continued lines of a value, so that none of them is the closing `---`.
    text = yaml.safe_dump(dict(value), sort_keys=False)
    return f"---\n{text.strip()}\n---"


def _backticks(text: str, least: int) -> str:
    """Return one backtick more than the longest run in the text, and at least `least`."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
