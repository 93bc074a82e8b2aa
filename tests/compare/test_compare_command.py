"""`molf compare`: what it prints and writes, and its page in a browser."""

import csv
import io

import pytest

from browser import DESK, PHONE, needs_browser, opened_browser
from compared_runs import write_compared, write_six
from molf.cli import main
from molf.report.place import is_page


@pytest.fixture
def runs(tmp_path):
    return [str(path) for path in write_six(tmp_path)]


def printed(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 0
    return capsys.readouterr()


def fails(capsys, *arguments):
    """The line of a refused command, which has written nothing to standard output."""
    assert main(["compare", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_terminal(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = printed(capsys, *runs).out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    values = {row[0]: row for row in reversed(rows) if row}
    assert values["accuracy"][1].startswith("0.625 [")
    assert values["accuracy"][3].endswith("] *")
    assert values["accuracy"][4].startswith("+0.312 [")
    assert values["forgetting (lower)"][1].startswith("0.651 [")
    assert values["trained parameters (lower)"][1:4] == ["1,200 *", "1,200 ~", "1,200 ~"]
    assert values["peak memory, MiB (lower)"][1].startswith("102 [95, 108]")
    assert "demo-med, tiny: difference to the best" in out
    assert "MoLF - max(fft, LoRA): minus the better of both" in out
    assert "accuracy         share of questions answered rightly" in out


def test_markdown_and_csv(runs, capsys):
    text = printed(capsys, *runs, "--markdown").out
    assert "| metric | fft (n 2) | lora (n 2) | molf (n 2) | MoLF - max(fft, LoRA) |" in text
    (line,) = [x for x in text.splitlines() if x.startswith("| forgetting (lower) | 0.6")]
    assert line.split(" | ")[2].startswith("**0.051 [")
    rows = [*csv.DictReader(io.StringIO(printed(capsys, *runs, "--csv").out))]
    assert len(rows) == 6 * 3
    row = next(x for x in rows if (x["metric"], x["method"]) == ("accuracy", "molf"))
    assert (row["value"], row["place"], row["seeds"]) == ("0.9375", "best", "1,2")
    assert row["minus_max_fft_lora"] == "0.3125"
    assert row["minus_best"] == ""


def test_notices_are_no_part_of_csv(tmp_path, capsys):
    paths = [write_compared(tmp_path / str(i), "fft", i, right=(1, 0)) for i in (1, 2)]
    (paths[0] / "predictions.jsonl").unlink()
    out, err = printed(capsys, *paths, "--csv")
    assert out.startswith("task,model,metric")
    assert "predictions.jsonl is missing" not in out
    assert "molf: note: " in err


def test_page_and_figures(runs, tmp_path, capsys):
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    lines = printed(capsys, *runs, "--output", page, "--figures", figures).out.splitlines()
    assert lines[-2:] == [f"page      {page}", f"figures   3 files in {figures}"]
    assert is_page(page)
    assert "Not beaten in both forgetting and accuracy: lora, molf." in page.read_text()
    names = {path.name for path in figures.iterdir()}
    assert names == {f"pareto-demo-med-tiny.{kind}" for kind in ("png", "svg", "csv")}
    printed(capsys, *runs, "--output", page)  # a page is replaced


def test_wrong_input(runs, tmp_path, capsys):
    assert "given: none" in fails(capsys)
    assert "Give one of them" in fails(capsys, *runs, "--csv", "--markdown")
    assert "pareto is for a figure" in fails(capsys, *runs, "--pareto", "accuracy,forgetting")
    assert "Did you mean accuracy?" in fails(
        capsys, *runs, "--pareto", "acuracy,forgetting", "--figures", tmp_path / "f"
    )
    own = tmp_path / "own.html"
    own.write_text("mine")
    assert "exists. Give --overwrite" in fails(capsys, *runs, "--output", own)
    assert own.read_text() == "mine"
    assert not (tmp_path / "f").exists()
    other = write_compared(tmp_path / "other", "lora", 3, data="bb")
    assert f"{runs[0]} and {other} are not comparable: " in fails(capsys, *runs, other)


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_in_a_browser(runs, tmp_path, capsys, size, theme):
    page = tmp_path / "page.html"
    printed(capsys, *runs, "--output", page)
    with opened_browser() as browser:
        browser.open(page, size, theme)
        assert browser.problems == []
        assert browser.requests == [page.resolve().as_uri()]
        assert browser.js("document.documentElement.scrollWidth") <= size[0]
        assert browser.js("document.querySelectorAll('.points .mark').length") == 3
        # Lines of the intervals have a length, and points lie inside of the picture.
        boxes = browser.js(
            "(frame => [...document.querySelectorAll('.points .mark')].map(x => "
            "x.getBoundingClientRect()).every(x => x.left > frame.left && x.right < frame.right))"
            "(document.querySelector('svg.points').getBoundingClientRect())"
        )
        assert boxes
        browser.js("document.querySelector('details.values').open = true")
        browser.wait("document.querySelector('details.values table')")
        names = {(role, name) for role, name, _ in browser.tree()}
        assert ("image", "accuracy and forgetting: demo-med, tiny") in names
        assert ("region", "Values of accuracy and forgetting: demo-med, tiny") in names
        assert ("region", "Table: Means over seeds") in names
