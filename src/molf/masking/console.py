"""A console for lines and tables that shows no secrets."""

from __future__ import annotations

from typing import Any

import rich.console
from rich.text import Text

from molf.masking import mask_text


class Console(rich.console.Console):
    """rich's console; secrets are masked before a text is wrapped into lines and cells."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make what is printed, or a cell of a table, of a text."""
        return super().render_str(mask_text(text), **options)
