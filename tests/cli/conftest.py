import json
from pathlib import Path

import pytest

from molf.cli import main


@pytest.fixture
def facts(tmp_path) -> Path:
    """Two requests in CounterFact's layout."""
    path = tmp_path / "facts.jsonl"
    records = [
        {
            "requested_rewrite": {
                "prompt": "{} lives in",
                "subject": subject,
                "target_true": {"str": "Paris"},
                "target_new": {"str": "Rome"},
            },
            "paraphrase_prompts": [],
            "neighborhood_prompts": [],
        }
        for subject in ("Anna", "Bruno")
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def base(tmp_path) -> Path:
    """What looks like a checkpoint; wrong input must be found before it is loaded."""
    path = tmp_path / "base"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def short_text(monkeypatch):
    """A tenth of the text of forgetting, which takes half of a training of two steps."""
    monkeypatch.setattr("molf.world.documents._HELD_OUT_PROFILES", 10)
    monkeypatch.setattr("molf.world.documents._HELD_OUT_MISCELLANIES", 6)


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run a command that must end with code 2 and one line, and must not write anything."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = _listing(tmp_path)
        assert main(list(arguments)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("molf: error: ")
        assert captured.err.count("\n") == 1, captured.err
        assert _listing(tmp_path) == before
        return captured.err

    return run


def _listing(path: Path) -> list[Path]:
    return sorted(path.rglob("*"))
