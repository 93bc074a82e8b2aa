"""Print the notes of a release from CHANGELOG.md, after checks of its tag.

    python scripts/release_notes.py v0.1.0 > notes.md

The tag must be `v` and the version of pyproject.toml, CITATION.cff must have the same version, and
CHANGELOG.md a section `## 0.1.0` or `## 0.1.0 - 2026-11-29`. Needs the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def release_notes(tag: str, root: Path = ROOT) -> str:
    """Return the notes of a release.

    Args:
        tag: Its tag, such as `v0.1.0`.
        root: The folder with pyproject.toml, CITATION.cff and CHANGELOG.md.

    Raises:
        ValueError: The versions differ, or the changelog has no entries for this one.
    """
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    version = pyproject["project"]["version"]
    if tag != f"v{version}":
        raise ValueError(f"Invalid tag {tag}. pyproject.toml has version {version}: v{version}.")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    if not re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE):
        raise ValueError(f"CITATION.cff has another version than {version}.")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]
    for section in sections:
        title, _, text = section.partition("\n")
        if title.strip("[] ").split(" ")[0].rstrip("]") == version and text.strip():
            return text.strip()
    raise ValueError(f"CHANGELOG.md has no entries below `## {version}`.")


def main(arguments: list[str]) -> int:
    """Print the notes, or the fault; return the exit code."""
    if len(arguments) != 1:
        print("Usage: python scripts/release_notes.py TAG", file=sys.stderr)
        return 2
    try:
        print(release_notes(arguments[0]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
