"""The page of runs as text: one file, no address, escaped data, the same figures in files."""

import base64
import csv
import hashlib
import html
import json
import math
import re

import numpy as np
import pytest
import yaml

from molf.report.build import read_runs
from molf.report.figures import binned, lines, plain, smoothed
from molf.report.page import render, sections_of
from molf.report.results import Shown, _cell
from molf.report.run_data import Value
from molf.report.run_figures import write_figures
from run_files import EXPERTS, LAYERS, write_evaluation, write_examples, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_page_is_one_file(run):
    page = render(read_runs([run]))
    assert not re.findall(r'(?:src|href)="(?!#|data:,")', page)
    policy = html.unescape(re.search(r'Security-Policy" content="([^"]*)"', page)[1])
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in scripts]
    assert policy.startswith("default-src 'none'; script-src ")
    assert re.findall(r"'sha256-([^']*)'", policy) == hashes
    assert len(hashes) == 2


def test_data_is_escaped(run):
    """A prediction that ends the script element stays data."""
    page = render(read_runs([run]))
    assert "<script>alert(1)" not in page
    texts = [text for one in data_of(page)["samples"][0] for _, text in one["texts"]]
    assert sum("</script><script>alert(1)</script>" in text for text in texts) == 10
    config = (run / "config.yaml").read_text().replace("/models/tiny", "<img src=x>&b")
    (run / "config.yaml").write_text(config)
    page = render(read_runs([run]))
    assert "<img" not in page
    assert "&lt;img src=x&gt;&amp;b" in page


def test_map_holds_the_winners(run):
    page = render(read_runs([run]))
    figures = {one["id"]: one for one in data_of(page)["figures"]}
    assert [*figures] == [
        *("loss", "rates", "grad_norm", "tokens_per_second", "memory"),
        *("winners", "margins", "shares", "settled", "flips", "kinds", "depths"),
    ]
    winners = figures["winners"]
    planes = [np.frombuffer(base64.b64decode(x), dtype=np.uint8) for x in winners["planes"]]
    full, lora = (plane.reshape(len(LAYERS), 60) for plane in planes)
    assert (full[:, 0] == 255).all()  # step 1 is at rate 0
    assert (full[:, 1:].astype(int) + lora[:, 1:] == 200).all()
    assert (full[1, 1:] == 200).all()  # k_proj
    assert winners["names"] == [*EXPERTS]
    margins = figures["margins"]
    plane = np.frombuffer(base64.b64decode(margins["planes"][0]), dtype=np.uint8)
    assert plane.reshape(len(LAYERS), 60)[1, 5] == 150  # (3 - 1) / (3 + 1), as 100 (1 + margin)
    assert margins["factors"][24] == 1
    assert margins["table"]["rows"][24][:2] == [1, 2]


def test_training_time_is_the_recorded_one(run):
    """The last line of the log is written before the last checkpoint."""
    time = r"<dt>Training time</dt>\s*<dd>(.*?)</dd>"
    assert re.findall(time, render(read_runs([run]))) == ["120.0 s"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["training"]["seconds"] = 123.25
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert re.findall(time, render(read_runs([run]))) == ["123.2 s"]


def test_changes_of_winners_are_told_once(run):
    """A finished run records them; the page counts those of the log alone without that record."""
    text = html.unescape(render(read_runs([run])))
    assert "5 flips (changes of winner) in 9 layers, the last in step 51 of 60; 8 layers" in text
    said = "8 of 9 layers never changed their winner; 0.6 changes per layer, the last in step 51."
    for meaning, count in ((said, 0), ("One-sided: lora0_r4 took every update.", 1)):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["run"]["routing"] = {"meaning": meaning}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        page = render(read_runs([run]))
        assert page.count(meaning) >= 1
        assert page.count("(changes of winner) in 9 layers") == count


def test_examples_of_a_run(run):
    """A run without them has no section; of a damaged file the page shows the readable lines."""
    assert "Training examples" not in render(read_runs([run]))
    write_examples(run)
    (data,) = read_runs([run])
    assert (len(data.examples), data.notices) == (12, [])
    page = render([data])
    assert '<p class="text">12 examples, spread evenly over them. Marked text' in page
    assert "<script>alert(2)" not in page
    predictions, examples = data_of(page)["samples"]
    assert (len(predictions), len(examples)) == (10, 12)
    assert examples[1]["about"] == "20 tokens, 8 with loss"
    assert examples[1]["texts"] == [["doubtful", "a turn carries no loss"]]
    with (run / "examples.jsonl").open("a") as file:
        file.write('{"index": 1}\n[]\n{"index"')
    (data,) = read_runs([run])
    assert (len(data.examples), data.notices) == (
        12,
        ["examples.jsonl: 3 lines cannot be read."],
    )


def test_sentences(run):
    page = html.unescape(render(read_runs([run])))
    assert "5 flips (changes of winner) in 9 layers, the last in step 51 of 60" in page
    assert "accuracy 0.500 before, 0.700 after (+0.200)." in page
    assert "forgetting_loss (lower is better)" in page
    assert "In 6 of 9 layers most decisions went to the winner that shape" in page
    assert "molf train --method molf" in page
    assert "10 records, 5 right and 5 wrong." in page


def test_several_runs_share_axes(run, tmp_path):
    other = write_run(tmp_path / "other", method="lora", steps=30)
    page = render(read_runs([run, other]))
    figures = {one["id"]: one for one in data_of(page)["figures"]}
    assert {"winners-0", "loss-0", "loss-1"} <= figures.keys()
    assert "winners-1" not in figures
    for name in ("x_range", "y_range"):
        assert figures["loss-0"][name] == figures["loss-1"][name]
    assert figures["loss-0"]["x_range"] == [1, 60]
    for name in ("run: before", "run: after", "other: before", "other: after"):
        assert f'<th scope="col">{name}</th>' in page


def test_evaluation(tmp_path):
    write_evaluation(tmp_path)
    record = json.loads((tmp_path / "eval.json").read_text())
    record = {"task": "demo-med", "metrics": record["after"], "notes": {}}
    (tmp_path / "eval.json").write_text(json.dumps(record))
    page = render(read_runs([tmp_path]))
    assert '<th scope="col">value</th>' in page
    assert "0.600 to 0.800 (n 20)" in page
    assert data_of(page)["figures"] == []


def test_run_with_nothing_yet(tmp_path):
    run = write_run(tmp_path / "run", steps=1, complete=False)
    (run / "metrics.jsonl").write_text("")
    page = render(read_runs([run]))
    assert "No expert has won anything yet." in page
    assert data_of(page)["figures"] == []


def test_figures_as_files(run, tmp_path):
    (data,) = read_runs([run])
    paths = write_figures([data], tmp_path / "figures")
    names = {path.name for path in paths}
    for section in sections_of(data):
        for figure in section.figures:
            assert {f"{figure.name}.{kind}" for kind in ("png", "svg", "csv")} <= names
    assert {"metrics.csv", "winners-table.csv"} <= names
    with (tmp_path / "figures" / "winners.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == len(LAYERS) * 60
    assert rows[1] == {
        "layer": LAYERS[0],
        "first step": "2",
        "last step": "2",
        "full": "0",
        "lora0_r4": "1",
    }


def test_equal_figures_are_equal_files(tmp_path):
    run = read_runs([write_run(tmp_path / "run", method="lora")])
    first, again = (write_figures(run, tmp_path / name) for name in ("first", "again"))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in first]
    assert len(first) == 16  # three of each of five figures, and the metrics


def test_long_lines_are_averaged():
    x = np.arange(1, 2502, dtype=float)
    y = np.where(np.arange(2501) % 3 == 0, np.nan, x)
    figure = lines("a", "A", "Text.", x, [], y_label="y")
    assert (len(figure.x), figure.x[0], figure.x[-1]) == (834, 3, 2501)
    assert figure.text == "Text. Each point is the mean of 3 values."
    assert binned(y, 3)[:2].tolist() == [2.5, 5.5]
    assert np.isnan(binned(np.array([np.nan, np.nan, 1.0]), 2)[0])


def test_smoothing_has_no_bias_towards_the_start():
    assert smoothed(np.array([2.0, np.nan, 2.0, 2.0]), 5)[2:] == pytest.approx([2.0, 2.0])
    found = smoothed(np.array([0.0, 3.0]), 3)  # weights 1/2 and 1
    assert found.tolist() == [0.0, 2.0]


def test_small_values_keep_two_digits():
    """As in the terminal: an interval of 0.001 to 0.001 has no length."""
    value = Value(0.00061, 0.0005, 0.00073, 12)
    assert _cell(value) == Shown("0.00061", "0.0005 to 0.00073 (n 12)")
    assert _cell(Value(1478647.02, math.nan, math.nan, 3)).value == "1.479e+06"


def test_plain_numbers():
    assert [plain(x) for x in (1.0, 0.12345678, float("nan"), 1234567.25, None)] == [
        *(1, 0.123457, None, 1234567.25, None)
    ]
