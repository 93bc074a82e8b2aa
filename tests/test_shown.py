"""Texts as they may be shown."""

import io
import json

import pytest
import yaml

from molf.console import PlainConsole
from molf.disk.files import write_json, write_text, write_yaml
from molf.shown import LACKING, as_line, json_text, printable

HOSTILE = [
    "\x1b[2J", "\x9b31m", "\x07", "\x7f", "\u202e", "\u2066", "\u200e", "\u2028", "\ufeff",
    "\udcff", "\ud800", "\U000e0041", "\r", "\x00",
]  # fmt: skip
HARMLESS = ["plain", "\u4e2d\u3000\u6587", "na\u00efve\u00a0x", "\U0001f469\u200d\U0001f4bb", ""]


@pytest.mark.parametrize("text", HOSTILE)
def test_spelled_out(text):
    for shown in (printable(f"a{text}b"), as_line(f"a{text}b"), json_text({f"a{text}": text})):
        assert shown.isprintable()
    assert json.loads(json_text({f"a{text}": text})) == {f"a{text}": text}


@pytest.mark.parametrize("text", HARMLESS)
def test_left_as_it_is(text):
    assert printable(text) == as_line(text) == text
    assert json_text(text) == json.dumps(text, ensure_ascii=False)


def test_layout():
    assert printable("a\n\tb") == "a\n\tb"
    assert as_line("a\n\tb") == "a\\n\\tb"
    assert json_text({"a": ["\n"]}, indent=1) == json.dumps({"a": ["\n"]}, indent=1)


def test_what_an_encoding_lacks_keeps_the_value_of_json():
    value = "\u00e9\u4e2d\U0001f600"
    written = json_text(value).encode("ascii", errors=LACKING)
    assert json.loads(written) == value


@pytest.mark.parametrize("text", HOSTILE)
def test_files_keep_values_and_show_none_of_it(tmp_path, text):
    value = {"name": f"a{text}b: c", "list": [text]}
    write_json(tmp_path / "v.json", value)
    write_yaml(tmp_path / "v.yaml", value)
    write_text(tmp_path / "v.md", text)
    for path in tmp_path.iterdir():
        assert all(line.isprintable() for line in path.read_text().split("\n"))
    assert json.loads((tmp_path / "v.json").read_text()) == value
    assert yaml.safe_load((tmp_path / "v.yaml").read_text()) == value


def test_tables_and_lines():
    from rich.table import Table

    table = Table(title="t\x1b[1m")
    table.add_column("[bold]c\u202e")
    table.add_row(":bug:\x1b]0;x\x07")
    console = PlainConsole(file=io.StringIO(), width=80, force_terminal=False)
    console.print(table)
    console.lines("[red]x\x1b[2J\ny", ":bug:")
    shown = console.file.getvalue()
    assert all(line.isprintable() for line in shown.split("\n"))
    for text in ("t\\x1b[1m", "[bold]c\\u202e", ":bug:\\x1b]0;x\\x07", "[red]x\\x1b[2J\\ny"):
        assert text in shown
