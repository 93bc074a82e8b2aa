"""Check a built site: pages load nothing from other servers, and local links have targets.

    python scripts/check_site.py site

Prints a line per fault, and ends with exit code 1 if there is one. Links to other sites are not
opened.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes with an address that a browser loads without a click, by element.
LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "image": "href",
    "img": "src",
    "input": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "track": "src",
    "use": "href",
    "video": "src",
}
_LINKED = ("index", "search", "next", "prev", "canonical", "author")  # `link` that loads nothing
_STYLE_ADDRESS = re.compile(r"""(?:url\(\s*|@import\s+)['"]?([^'")\s]+)""")


class _Page(HTMLParser):
    """Collects the addresses and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self._in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the addresses and the anchor of an element."""
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self._in_style = tag == "style"
        self.loaded += _STYLE_ADDRESS.findall(values.get("style", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADED and LOADED[tag] in values:
            is_link = tag == "link" and values.get("rel") in _LINKED
            (self.links if is_link else self.loaded).append(values[LOADED[tag]])
        if "srcset" in values:
            self.loaded += [part.split()[0] for part in values["srcset"].split(",") if part.strip()]

    def handle_data(self, data: str) -> None:
        """Collect the addresses of a style element."""
        if self._in_style:
            self.loaded += _STYLE_ADDRESS.findall(data)


def faults(folder: Path) -> Iterator[str]:
    """Yield a line for each address that other servers would get, and each broken local link.

    Args:
        folder: The built site.
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    if not pages:
        yield f"{folder}: no page"
    for path, page in sorted(pages.items()):
        name = path.relative_to(folder)
        for address in page.loaded:
            if _is_remote(address):
                yield f"{name}: loads {address}"
            elif not _has_target(address, path, pages, folder):
                yield f"{name}: loads {address}, which does not exist"
        for address in page.links:
            if not _is_remote(address) and not _has_target(address, path, pages, folder):
                yield f"{name}: links to {address}, which does not exist"
    for path in sorted(folder.rglob("*.css")):
        for address in _STYLE_ADDRESS.findall(path.read_text(encoding="utf-8")):
            if _is_remote(address):
                yield f"{path.relative_to(folder)}: loads {address}"


def _is_remote(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ftp")


def _has_target(address: str, page: Path, pages: dict[Path, _Page], folder: Path) -> bool:
    parts = urlsplit(address)
    if parts.scheme:  # data:, mailto:
        return True
    target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    if target.is_dir():
        target = target / "index.html"
    if not target.is_relative_to(folder.resolve()) or not target.is_file():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in pages or anchor in pages[target].anchors


def main(folder: Path) -> int:
    """Print the faults of a site; return the exit code."""
    found = list(faults(folder.resolve()))
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        count = len(list(folder.rglob("*.html")))
        print(f"{count} pages: no request to other servers, no broken local link.")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
