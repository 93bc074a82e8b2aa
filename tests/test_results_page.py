"""Pages of results hold the figures of the stored studies, and no other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield __import__("results_page")
    sys.modules.pop("results_page")


def test_the_pages_are_those_of_the_stored_studies(script):
    assert script.main(["--check"]) == 0, "run python scripts/results_page.py"


def test_the_templates_have_no_measured_figure(script):
    templates = sorted(script.DOCS.glob("*.template.md"))
    assert templates
    for path in templates:
        text = re.sub(r"{{.+?}}", "", path.read_text())
        assert not re.findall(r"\d\.\d|\d%", text.replace("95%", ""))


def test_a_changed_figure_is_found(script, monkeypatch):
    (path, text), *_ = script.pages().items()
    monkeypatch.setattr(script, "pages", lambda: {path: text.replace("0.", "1.", 1)})
    assert script.main(["--check"]) == 1


def test_unknown_words_of_the_template(script):
    study = next(path.name for path in script.STUDIES.iterdir())
    with pytest.raises(KeyError, match="sum"):
        script.page(f"{{{{sum {study}}}}}")
