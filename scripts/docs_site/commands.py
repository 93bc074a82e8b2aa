"""The reference of commands and options, from the definitions of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from molf.cli.app import app

_HEADING = re.compile(r"^(?P<level>#+) (?P<command>molf .*)$")
_GROUP = re.compile(r"^\*\*(?P<name>[^*]+)\*\*:$")
_OPTION = re.compile(r"^\* `(?P<names>[^`]+)`: (?P<text>.*)$", re.DOTALL)
_NOTE = re.compile(r"\s\*\[(?P<name>choices|default): (?P<value>[^*]*)\]\*")
_UNNAMED = ("Arguments", "Parameters", "Commands")  # cyclopts' own groups


def command_reference() -> str:
    """Return Markdown with every command and option of `molf`.

    The text is that of cyclopts' generator, with an entry of a definition list for each option,
    because a table is too wide for a phone.
    """
    text = app.generate_docs(output_format="markdown", recursive=True)
    text = text[text.index("## molf train") :]
    return "\n".join(_entries(_joined(text)))


def _joined(text: str) -> Iterator[str]:
    """Yield the lines, with an option that has several lines as one."""
    line = None
    for following in text.splitlines():
        if line is not None and following.startswith("    "):
            line = f"{line} {following.strip()}"
            continue
        if line is not None:
            yield line
        line = following
    if line is not None:
        yield line


def _entries(lines: Iterator[str]) -> Iterator[str]:
    heading = None
    for line in lines:
        if found := _HEADING.match(line):
            heading = found
            yield line
        elif (group := _GROUP.match(line)) and heading is not None:
            if group["name"] in _UNNAMED:
                yield f"**{'Options' if group['name'] == 'Parameters' else group['name']}**"
            else:
                yield f"#{heading['level']} {heading['command']}: {group['name'].lower()}"
        elif option := _OPTION.match(line):
            yield from _entry(option["names"], option["text"])
        else:
            yield line


def _entry(names: str, text: str) -> Iterator[str]:
    notes = {note["name"]: note["value"] for note in _NOTE.finditer(text)}
    text = _NOTE.sub("", text).replace("**[required]**", "Required.").replace("<", "&lt;")
    text = re.sub(r"\s+", " ", text).strip()
    if "choices" in notes:
        text += f" One of {', '.join(f'`{word}`' for word in notes['choices'].split(', '))}."
    if notes.get("default", "False") != "False":  # a switch is off unless it is given
        text += f" Default: {notes['default']}."
    yield from (f"`{names}`", f": {text}", "")
