"""The console for tables and progress: markup is off, secrets are masked."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from molf.masking import mask_text
from molf.shown import as_line


def new_table(title: str, *columns: str) -> Table:
    """Return a table with the first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


class PlainConsole(Console):
    """A rich console that prints markup, emoji codes and control characters literally.

    Each string, also in a table or a title, is shown on one line.
    """

    def __init__(self, **settings: Any) -> None:
        # Text of users may look like markup, such as `[red]`.
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return the text with secrets masked, as a rich `Text`."""
        # Masked before rich wraps the text: a secret broken over two lines would not be found.
        return super().render_str(as_line(mask_text(text)), **settings)

    def lines(self, *lines: str) -> None:
        """Print lines without wrapping them at the width of the terminal."""
        for line in lines:
            self.print(line, soft_wrap=True)
