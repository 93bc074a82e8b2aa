"""What a command says to the terminal beside its output: one line for each thing, no secrets."""

from __future__ import annotations

import sys
from typing import TextIO

from molf.masking import mask_text
from molf.shown import as_line
from molf.streams import silenced

_LONGEST = 2000  # characters; input that is quoted may have any number of them


def say(kind: str, text: str, file: TextIO | None = None) -> None:
    """Write `molf: KIND: TEXT` as one line, to standard error unless another file is given."""
    silenced(file or sys.stderr).write(f"molf: {kind}: {one_line(mask_text(text))}\n")


def one_line(text: str) -> str:
    """A text without line breaks and control characters, cut in the middle if it is very long."""
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        half = _LONGEST // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return as_line(line)
