"""Complete the text of a page when Sphinx reads it.

Three things differ between a page in the repository and on the site. A line
`<!-- generated: NAME -->` becomes text that is generated from the package. A link to a folder of
the repository becomes plain text, because the site has single files only. A drawing is put into the
page, so that it follows the theme of the reader.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from pathlib import Path

from docs_site.api import api_reference
from docs_site.commands import command_reference
from docs_site.notebook import decisions, notebook_page
from docs_site.support import refusals, support_tables

ROOT = Path(__file__).resolve().parents[2]

GENERATED: dict[str, Callable[[], str]] = {
    "api": api_reference,
    "commands": command_reference,
    "contributing": lambda: _root_page("CONTRIBUTING.md"),
    "changelog": lambda: _root_page("CHANGELOG.md"),
    "base": lambda: _root_page("src/molf/world/base/README.md"),
    "decisions": decisions,
    "notebook": notebook_page,
    "refusals": refusals,
    "support": support_tables,
}
"""The functions that generate text, by the name in the page."""

PAGES = {
    "../README.md": "index.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../CHANGELOG.md": "changelog.md",
    "../src/molf/world/base/README.md": "base-model.md",
}
"""The pages of Markdown files outside of docs/, by their address from there."""

_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)\)")
_DRAWING = re.compile(r"^!\[([^\]]+)\]\((drawings/[\w-]+\.svg)\)$", re.MULTILINE)


def complete_page(text: str, path: Path) -> str:
    """Return the text of a page with its generated parts, drawings, and links that the site has.

    Args:
        text: Markdown.
        path: The file of the page.

    Raises:
        ValueError: The page asks for a generated part that does not exist.
    """
    text = _MARK.sub(lambda match: _generated(match[1], path), text)
    text = _LINK.sub(lambda match: _link(match, path), text)
    return _DRAWING.sub(lambda match: _inline_drawing(match[1], path.parent / match[2]), text)


def _generated(name: str, path: Path) -> str:
    if name not in GENERATED:
        raise ValueError(
            f"{path.name}: generated part {name!r} is unknown. Must be one of "
            f"{', '.join(GENERATED)}."
        )
    return GENERATED[name]()


def _link(match: re.Match[str], path: Path) -> str:
    """Return a link as the site has it."""
    if match[2] in PAGES:
        return f"[{match[1]}]({PAGES[match[2]]})"
    is_folder = "://" not in match[2] and (path.parent / match[2]).is_dir()
    return match[1] if is_folder else match[0]


def _root_page(name: str) -> str:
    """Return a file outside of docs/ without its title, with links as from docs/."""
    text = re.split(r"^# .*\n", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda match: f"]({_from_docs(match[1])})", text)


def _from_docs(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def _inline_drawing(text: str, path: Path) -> str:
    """Return a figure with the drawing's elements in the page.

    The style sheet of the site has the rules and colours of drawings, so those of the file are
    removed.
    """
    drawing = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    drawing = drawing.replace("<svg ", f'<svg aria-label="{escape(text)}" ', 1)
    lines = [line for line in drawing.splitlines() if line.strip()]  # a blank line ends HTML
    return "\n".join(['<figure class="drawing">', *lines, "</figure>"])
