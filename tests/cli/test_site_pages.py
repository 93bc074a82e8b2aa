"""The commands of docs/start.md run, and docs/coming-from.md names options that exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from molf.cli import main
from molf.cli.eval_options import EvalOptions
from molf.job.settings.settings import TrainSettings
from molf.world import BASE_PATH

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
START = (DOCS / "start.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", START, re.M | re.S)


@pytest.mark.slow
def test_start(tmp_path, monkeypatch, capsys, short_text):
    """From the records to the page, with the embedded model in the place of the downloaded one."""
    monkeypatch.chdir(tmp_path)
    (records,) = blocks("json")
    Path("records.jsonl").write_text(records)
    install, *commands = [block.replace("\\\n", "").splitlines() for block in blocks("bash")]
    assert [line.split()[0] for line in install] == ["git", "make", "source"]
    for line in (line for block in commands for line in block):
        given = shlex.split(line.replace("Qwen/Qwen2.5-0.5B", str(BASE_PATH)))
        assert given[0] == "molf"
        assert main(given[1:]) in (None, 0), line
    for page in ("out/report.html", "out-lora/report.html", "both.html"):
        assert Path(page).stat().st_size > 100_000
    assert "10 read: 9 to train on, 1 held out" in capsys.readouterr().out
    (program,) = blocks("python")
    exec(compile(program, "start.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Ticket: The app is slow on my phone.")


def test_options_of_other_libraries_are_those_of_molf():
    known = {field.name for options in (TrainSettings, EvalOptions) for field in fields(options)}
    known |= {"config", "version", "help"}
    table = re.sub(r"\| `axolotl [^|]*\|", "|", (DOCS / "coming-from.md").read_text())
    named = set(re.findall(r"--(?:no-)?([a-z_0-9]+)", table)) - {"training_args"}
    assert len(named) > 25
    assert named <= known
