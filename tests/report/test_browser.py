"""The page in a headless Chromium: drawn, without errors and requests, for keyboard and reader."""

import json

import pytest

from browser import DESK, PHONE, TABLET, needs_browser, opened_browser
from molf.report.build import read_runs
from molf.report.page import render
from run_files import write_examples, write_run

pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one run, and one of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / "molf"), write_run(folder / "lora", method="lora", steps=30)]
    made = {}
    for name, count in (("one", 1), ("two", 2)):
        made[name] = folder / f"{name}.html"
        made[name].write_text(render(read_runs(runs[:count])))
    return made


INK = """(plot => {
  const canvas = plot.querySelector('canvas');
  if (!canvas) return plot.querySelectorAll('.bar i').length;
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = new Set();
  for (let at = 0; at < pixels.length; at += 4) if (pixels[at + 3]) {
    colors.add(pixels[at] * 65536 + pixels[at + 1] * 256 + pixels[at + 2]);
  }
  return colors.size;
})"""


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, TABLET, PHONE], ids=["desk", "tablet", "phone"])
def test_every_chart_is_drawn(browser, pages, name, theme, size):
    browser.problems.clear()
    browser.requests.clear()
    browser.open(pages[name], size, theme)
    assert browser.js("document.documentElement.dataset.theme") == theme
    found = browser.js(f"[...document.querySelectorAll('.plot')].map({INK})")
    assert len(found) == {"one": 12, "two": 17}[name]
    assert min(found) > 3
    # The page is never wider than the window: wide tables scroll within themselves.
    assert browser.js("document.documentElement.scrollWidth") <= size[0]
    assert browser.problems == []
    assert browser.requests == [pages[name].resolve().as_uri()]


def test_theme_changes_by_its_button(browser, pages):
    browser.open(pages["one"])
    before = browser.js("getComputedStyle(document.body).backgroundColor")
    browser.js("document.getElementById('theme').click()")
    assert browser.js("document.documentElement.dataset.theme") == "dark"
    assert browser.js("getComputedStyle(document.body).backgroundColor") != before
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert browser.js("document.documentElement.dataset.theme") == "dark"  # the choice stays


def test_screen_reader_reaches_text_and_table_of_every_figure(browser, pages):
    browser.open(pages["one"])
    figures = browser.js(
        "[...document.querySelectorAll('figure')].map(one => [one.id, "
        "one.querySelector('h3').textContent, one.querySelector('.text').textContent])"
    )
    browser.js("document.querySelectorAll('details.values').forEach(x => { x.open = true; })")
    browser.wait("document.querySelectorAll('details.values table').length === 12")
    tree = browser.tree()
    names = {(role, name) for role, name, _ in tree}
    assert len(figures) == 12
    for _, title, text in figures:
        assert ("figure", title) in names
        assert ("StaticText", text) in names
        assert ("region", f"Values of {title}") in names
    images = [(name, about) for role, name, about in tree if role == "image"]
    assert len(images) == 10  # ten canvases; bars are read from their tables
    assert all(about for _, about in images)


def test_keyboard_reaches_every_control(browser, pages):
    browser.open(pages["one"])
    controls = browser.js(
        "(all => [...document.querySelectorAll('a, button:not([hidden]), summary, select, input, "
        "canvas[tabindex]')].filter(x => x.checkVisibility()).map(x => all.indexOf(x)))"
        "([...document.querySelectorAll('*')])"
    )
    seen = set()
    for _ in range(2 * len(controls)):
        browser.press("Tab")
        seen.add(
            browser.js(
                "(one => [...document.querySelectorAll('*')].indexOf(one))(document.activeElement)"
            )
        )
    assert len(controls) > 20
    assert set(controls) <= seen


def test_arrow_keys_read_cells(browser, pages):
    browser.open(pages["one"])
    browser.js("document.querySelector('#winners canvas').focus()")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        browser.press(key)
    read = browser.js("document.querySelector('#winners output').textContent")
    assert read == "model.layers.0.k_proj, step 3: full 100%, lora0_r4 0%"
    browser.js(
        "(one => { one.value = 'kind'; one.dispatchEvent(new Event('change')); })"
        "(document.querySelector('#winners select'))"
    )
    browser.press("ArrowRight")  # the second row is now another layer of the first kind
    read = browser.js("document.querySelector('#winners output').textContent")
    assert read.startswith("model.layers.1.q_proj, step 4: ")


def test_slider_compares_other_rates(browser, pages):
    browser.open(pages["one"])
    text = "[...document.querySelectorAll('#margins output')].pop().textContent"
    at_recorded = browser.js(text)
    assert at_recorded.startswith("At the recorded rates (LoRA rate 2 times full): full wins ")
    browser.js(
        "(one => { one.value = 48; one.dispatchEvent(new Event('input')); })"
        "(document.querySelector('#margins input'))"
    )
    assert browser.js(text) == (
        "At 64 times the recorded LoRA rate (LoRA rate 128 times full): full wins 0% of the "
        "recorded decisions, and most of them in 0 of 9 layers. No rerun."
    )


def test_samples_are_searched(browser, pages):
    browser.open(pages["one"])
    count = "document.querySelectorAll('.samples article').length"
    found = "document.querySelector('.samples output').textContent"
    assert (browser.js(count), browser.js(found)) == (10, "10 of 10 samples")
    browser.js("document.querySelector('[data-show=wrong]').click()")
    assert browser.js(found) == "5 of 10 samples"
    browser.js(
        "(one => { one.value = 'question 4'; one.dispatchEvent(new Event('input')); })"
        "(document.querySelector('.samples input'))"
    )
    assert browser.js(found) == "1 of 10 samples"
    shown = browser.js("document.querySelector('.samples article').textContent")
    assert "</script><script>alert(1)</script>" in shown
    assert browser.problems == []


def test_training_examples_have_their_loss_marked(browser, tmp_path):
    runs = [write_run(tmp_path / "new"), write_run(tmp_path / "old", method="lora", steps=30)]
    write_examples(runs[0])
    page = tmp_path / "page.html"
    for count in (1, 2):
        page.write_text(render(read_runs(runs[:count])))
        browser.problems.clear()
        browser.open(page, PHONE if count == 1 else DESK)
        (section,) = [
            index
            for index, what in enumerate(
                browser.js("[...document.querySelectorAll('.samples')].map(x => x.dataset.what)")
            )
            if what == "examples"
        ]
        place = f"document.querySelectorAll('.samples')[{section}]"
        assert browser.js(f"{place}.querySelector('output').textContent") == "12 of 12 examples"
        marks = f"[...{place}.querySelector('article').querySelectorAll('mark')]"
        assert browser.js(f"{marks}.map(x => x.textContent)") == [
            "bot: first answer\n",
            "bot: second answer",
        ]
        assert "<script>alert(2)" in browser.js(f"{place}.querySelector('article').textContent")
        browser.js(
            "(one => { one.value = 'carries no loss'; one.dispatchEvent(new Event('input')); })"
            f"({place}.querySelector('input'))"
        )
        assert browser.js(f"{place}.querySelector('output').textContent") == "1 of 12 examples"
        # The predictions beside them stay as they are.
        first = "document.querySelector('.samples output').textContent"
        assert browser.js(first) == "10 of 10 samples"
        names = {name for role, name, _ in browser.tree() if role == "region"}
        assert {"Samples of new", "Examples of new"} <= names
        assert "Examples of old" not in names
        assert browser.problems == []


def test_steps_have_whole_ticks_and_a_single_value_is_a_point(browser, tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["lost_updates"] = 0.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "page.html"
    page.write_text(render(read_runs([run])))
    browser.open(page)
    browser.js(RECORDED)
    browser.js("document.getElementById('theme').click()")
    made = {one[0]: one[1:] for one in browser.js("window.made")}
    assert [made["loss"][0][:3], made["flips"][1][:3]] == [[1, 2, 5]] * 2
    assert made["loss"][1] is None
    assert [made["loss"][2], made["lost_updates"][2]] == [False, True]


# The options of each chart that is drawn from now on: its last series, ticks of both axes, points.
RECORDED = """(() => {
  window.made = [];
  const paths = uPlot.paths;
  uPlot = function (options) {
    const { axes, series } = options;
    const last = series[series.length - 1];
    window.made.push([series[1].label, axes[0].incrs, axes[1].incrs || null, last.points.show]);
  };
  uPlot.paths = paths;
})()"""


def test_tables_hold_the_values(browser, pages):
    browser.open(pages["one"])
    browser.js("document.querySelector('details[data-figure=loss]').open = true")
    browser.wait("document.querySelector('details[data-figure=loss] table')")
    cells = browser.js(
        "[...document.querySelectorAll('details[data-figure=loss] tbody tr')].slice(0, 2)"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert cells == [["1", "1", "1"], ["2", "0.5", "0.66667"]]
