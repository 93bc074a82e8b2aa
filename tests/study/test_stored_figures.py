"""The drawings of the stored studies are those of their rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from molf.study.report.figures import draw_figures
from molf.study.report.records import read_records
from molf.study.report.summary import summarise
from pictures import difference

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
# A value moves a line by pixels; versions 3.9 and 3.11 of matplotlib differ by less.
MOST = 0.003

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(path.name for path in STUDIES.iterdir()))
def test_figures_are_those_of_the_stored_rows(name, tmp_path):
    stored = STUDIES / name
    drawn = draw_figures(tmp_path, summarise(read_records(stored)))
    names = sorted(name for names in drawn.values() for name in names)
    assert names == sorted(path.name for path in stored.glob("*.png"))
    found = {name: difference(tmp_path / name, stored / name) for name in names}
    assert {name: value for name, value in found.items() if value > MOST} == {}


@pytest.mark.parametrize("change", ["rate", "value", "harm", "method"])
def test_a_stale_figure_is_found(change, tmp_path):
    """A value of 0.49 that becomes 0.495, or a method that is missing."""
    stored = STUDIES / "smollm2-equal"
    cells = summarise(read_records(stored))
    one = cells[0].method("gsnr")
    if change == "rate":
        one.curve[sorted(one.curve)[1]] += 0.005
    elif change == "value":
        one.value = replace(one.value, value=one.value.value + 0.005)
    elif change == "harm":
        harm = one.harm["kl_task"]
        one.harm["kl_task"] = replace(harm, value=harm.value + 0.1)
    else:
        cells[0].methods.remove(one)
    draw_figures(tmp_path, cells)
    kind = "rates" if change == "rate" else "pareto"
    file = f"{kind}-real-fact.png"
    assert difference(tmp_path / file, stored / file) > 2 * MOST
