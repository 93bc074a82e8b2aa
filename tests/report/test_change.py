"""The change of the weights on the page: `spectra.json`, whole, in part, and damaged."""

import json

import pytest

from molf.report.change_figures import change_section
from molf.report.page import render
from molf.report.run_data import read_run_data
from run_files import write_run


def layer(number, **values):
    return {
        "name": f"layers.{number}.q_proj",
        "shape": [4, 4],
        "base_norm": 2.0,
        "held": 0.95,
        "change_norm": 0.1 * number,
        "directions_90": number,
        "effective_rank": 3.5,
        "intruders": number % 2,
        **values,
    }


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", method="lora")


def write(run, **values):
    layers = [layer(1), layer(2, directions_90=None), layer(3)]
    record = {"directions": 64, "layers": layers, "not_measured": [], **values}
    (run / "spectra.json").write_text(json.dumps(record))


def test_figures_of_the_change(run):
    write(run)
    data = read_run_data(run)
    section = change_section(data)
    norm, rank, intruders = section.figures
    assert section.text == ()
    assert norm.series[0].values.tolist() == pytest.approx([0.05, 0.1, 0.15])
    assert "largest 0.15 in layers.3.q_proj" in norm.text
    assert rank.table.rows[1][:3] == ("layers.2.q_proj", 0.1, None)
    assert intruders.text.startswith("2 intruders in 2 of 3 layers")
    assert 'id="change"' in render([data])


def test_layers_that_were_not_measured(run):
    write(run, not_measured=["layers.4.q_proj"])
    (line,) = change_section(read_run_data(run)).text
    assert line == "Measured: 3 of 4 layers; then the time was up."
    write(run, layers=[], not_measured=["layers.1.q_proj", "layers.2.q_proj"])
    data = read_run_data(run)
    section = change_section(data)
    assert section.figures == ()
    assert section.text == ("Measured: 0 of 2 layers; then the time was up.",)
    assert section.text[0] in render([data])


@pytest.mark.parametrize("values", [{"layers": [{"name": "a"}]}, {"layers": [3]}, {"layers": 1}])
def test_damaged(run, values):
    write(run, **values)
    data = read_run_data(run)
    assert data.notices == ["spectra.json cannot be read."]
    assert change_section(data) is None


def test_run_without(run):
    assert change_section(read_run_data(run)) is None
