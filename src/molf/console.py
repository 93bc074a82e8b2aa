"""The console that tables and progress are printed on: no markup, no secrets."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from molf.masking import mask_text
from molf.shown import as_line


class PlainConsole(Console):
    """A console of rich that reads no markup, no emoji and no control characters in texts.

    Every text that is given as such, in a table or a title as well, is shown on one line.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Make a `Text` without secrets, which are masked before it is wrapped into lines."""
        return super().render_str(as_line(mask_text(text)), **settings)

    def lines(self, *lines: str) -> None:
        """Print lines, none of which is broken however narrow the terminal is."""
        for line in lines:
            self.print(line, soft_wrap=True)
