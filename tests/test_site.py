"""The parts of the documentation site that `make docs` puts together, without building it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import molf
from check_site import faults, main
from docs_site.api import api_reference
from docs_site.commands import command_reference
from docs_site.drawings import DARK, DRAWINGS, FOLDER, LIGHT, RULES
from docs_site.notebook import notebook_page
from docs_site.pages import GENERATED, PAGES, complete_page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def write(folder: Path, **pages: str) -> Path:
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<script src="//cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="http://example.org/badge.svg">',
        '<img src="a.png" srcset="https://example.org/a.png 2x">',
        '<iframe src="https://example.org"></iframe>',
        "<style>@import 'https://example.org/a.css';</style>",
        '<p style="background: url(https://example.org/a.png)">',
        '<svg><image href="https://example.org/a.png"/></svg>',
    ],
)
def test_requests_to_other_servers_are_faults(element, tmp_path):
    (tmp_path / "a.png").touch()
    (fault,) = faults(write(tmp_path, page=element))
    assert fault.startswith("page.html: loads ")
    assert "example" in fault


def test_style_sheets_are_read(tmp_path):
    write(tmp_path, page="<p>")
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.example/a.woff2); }")
    assert list(faults(tmp_path)) == ["a.css: loads https://fonts.example/a.woff2"]


def test_links_to_other_sites_and_local_targets_are_allowed(tmp_path, capsys):
    other = '<h2 id="there">x</h2>'
    page = (
        '<a href="https://example.org">a</a><a href="other.html#there">b</a><a href="#here">c</a>'
        '<p id="here"><img src="data:image/png;base64,x"><link rel="next" href="other.html">'
    )
    assert main(write(tmp_path, page=page, other=other)) == 0
    assert capsys.readouterr().out.startswith("2 pages: no request")


@pytest.mark.parametrize(
    "element",
    [
        '<a href="missing.html">x</a>',
        '<a href="page.html#missing">x</a>',
        '<a href="../outside.html">x</a>',
        '<img src="missing.png">',
    ],
)
def test_broken_local_links_are_faults(element, tmp_path, capsys):
    (tmp_path / "outside.html").touch()
    (tmp_path / "site").mkdir()
    assert main(write(tmp_path / "site", page=element)) == 1
    assert "does not exist" in capsys.readouterr().err


def test_a_folder_without_pages_is_a_fault(tmp_path):
    assert main(tmp_path) == 1


def test_every_page_is_in_the_navigation():
    """A page of `docs/` that no list of the front page has would be an error of the build."""
    listed = re.findall(r"^(?:.* <)?([\w/-]+)>?$", (DOCS / "index.md").read_text(), re.M)
    pages = {path.stem for path in DOCS.glob("*.md") if ".template" not in path.name}
    assert pages - {"index"} <= set(listed)


def test_methods_of_a_form_are_those_of_its_class():
    from molf.core.step.layer import RoutedLayer

    page = (DOCS / "adding.md").read_text().split("## A form")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.M))))
    optional = {"far_factor", "far_part", "cut_of"}
    assert named == RoutedLayer.__abstractmethods__ | optional
    assert optional <= {*vars(RoutedLayer)}


def test_every_generated_part_is_used_and_known():
    used = [
        name
        for path in DOCS.glob("*.md")
        for name in re.findall(r"^<!-- generated: (\w+) -->$", path.read_text(), re.M)
    ]
    assert sorted(used) == sorted(GENERATED)
    with pytest.raises(ValueError, match=r"x\.md: generated part 'other' is unknown"):
        complete_page("<!-- generated: other -->", DOCS / "x.md")


@pytest.mark.parametrize("target", PAGES)
def test_files_that_become_pages_have_a_title_and_text(target):
    """An empty changelog ended the build of the site, and no other test."""
    _, title, text = (DOCS / target).read_text().partition("# ")
    assert title
    assert text.partition("\n")[2].strip()


def test_links_out_of_the_folder():
    page = DOCS / "x.md"
    for target, name in PAGES.items():
        assert (DOCS / target).is_file()
        assert complete_page(f"[a]({target})", page) == f"[a]({name})"
    assert complete_page("[code](../src/molf/core) x", page) == "code x"  # a folder
    unchanged = "[a](../src/molf/core/config.py) [b](tasks.md#sql) [c](https://example.org)"
    assert complete_page(unchanged, page) == unchanged


def test_commands_have_every_option():
    from dataclasses import fields

    from molf.job.settings.settings import TrainSettings

    text = command_reference()
    train = text.split("## molf eval")[0]
    for option in fields(TrainSettings):
        assert re.search(rf"^`[^`\n]*--{option.name}\b.*\n: \S", train, re.M), option.name
    assert "Default: ('" not in text
    assert "*[" not in text
    assert "</s>" not in text  # would be HTML
    for command in ("molf recipes cp", "molf study report", "molf advise"):
        assert f"## {command}\n" in text
    # Names are those of --help, also in groups of commands.
    assert "`--accept_changes`" in text
    assert re.findall(r"`(--(?!no-)\w+-[\w-]+)", text) == []


def test_api_has_every_public_name():
    text = api_reference()
    for name in molf.__all__:
        assert re.search(rf"^\.\. auto(class|function):: molf\.{name}$", text, re.M), name


def test_drawings_are_those_of_the_script():
    style = (DOCS / "_static" / "site.css").read_text()
    for line in RULES.splitlines():
        assert f".drawing {line}" in style
    assert style.count(LIGHT) == 1
    assert style.count(DARK) == 2
    assert sorted(path.stem for path in FOLDER.glob("*.svg")) == sorted(DRAWINGS)
    for name, draw in DRAWINGS.items():
        assert (FOLDER / f"{name}.svg").read_text() == draw(), "run scripts/docs_site/drawings.py"


def test_a_drawing_is_put_into_the_page():
    text = complete_page('![What "it" shows](drawings/step.svg)', DOCS / "x.md")
    assert 'aria-label="What &quot;it&quot; shows"' in text
    assert "<style>" not in text
    assert "\n\n" not in text


def test_the_notebook_is_a_page():
    text = notebook_page()
    assert text.count("```python") > 5
    assert "won 100% of 40 steps" in text
