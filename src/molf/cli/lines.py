"""Print a command's errors and warnings, one masked line each."""

from __future__ import annotations

import sys
from typing import TextIO

from molf.masking import mask_text
from molf.ranks import launched_rank
from molf.shown import as_line
from molf.streams import best_effort

_LONGEST = 2000  # characters; a message may quote input of any length


def say(kind: str, text: str, file: TextIO | None = None) -> None:
    """Write `molf: KIND: TEXT` as one line, to standard error unless another file is given.

    Of several processes, rank 0 writes all, and the others errors alone, with their rank.
    """
    if rank := launched_rank():
        if kind != "error":
            return
        text = f"rank {rank}: {text}"
    best_effort(file or sys.stderr).write(f"molf: {kind}: {one_line(mask_text(text))}\n")


def one_line(text: str) -> str:
    """Return the text without line breaks and control characters, shortened in the middle."""
    # Messages of libraries may have several lines and indentation.
    line = " ".join(text.split())
    if len(line) > _LONGEST:
        half = _LONGEST // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return as_line(line)
