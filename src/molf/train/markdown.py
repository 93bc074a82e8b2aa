"""Parts of a Markdown text that show names which users chose, and never become markup."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from molf.shown import as_line


def code(text: str) -> str:
    """A text as a code span, in which nothing but backticks means anything.

    Line breaks and characters that cannot be seen are written as escapes.
    """
    shown = as_line(text) or " "
    fence = _backticks(shown, 1)
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}"


def yaml_block(value: Mapping[str, Any]) -> str:
    """Values as a fenced block of YAML, which no value of theirs can end."""
    text = yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True).strip()
    fence = _backticks(text, 3)
    return f"{fence}yaml\n{text}\n{fence}"


def front_matter(value: Mapping[str, Any]) -> str:
    """Values as the YAML in front of a text."""
    # Further lines of a value are indented, so that none of them is the `---` that ends it.
    text = yaml.safe_dump(dict(value), sort_keys=False)
    return f"---\n{text.strip()}\n---"


def _backticks(text: str, least: int) -> str:
    """More backticks than the text has anywhere in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
