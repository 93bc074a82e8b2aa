"""Figures of speed and memory in the documentation are those of the records."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def page(name: str) -> str:
    """A page, each run of white space as one space."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text().split())


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}_cpu.json").read_text())


def scripts_of_the_table() -> list[tuple[str, float]]:
    """The script (the last one named) and the limit of each row."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    table = text.partition("## The bars\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \|.*\| ([\d.]+) \|$", table, re.M)
    found = []
    for script, limit in rows:
        name = found[-1][0] if script == "both" else script.strip("`")
        found.append((name, float(limit)))
    return found


@pytest.fixture
def runs(monkeypatch):
    """The scripts of `make bench`, with their options, by record."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "bars", raising=False)
    import bars

    return bars.RUNS


def test_make_bench_measures_every_bar_but_that_of_growth(runs):
    table = scripts_of_the_table()
    assert len(table) == 16
    measured = [set(run) for run in runs.values()]
    for text, _ in table:
        if text != "growth.py":
            assert any(set(text.split()) <= run for run in measured), text
    assert table[-1][0] == "growth.py"


def test_limits_are_those_of_the_records(runs):
    files = {"growth_cpu": "growth.py"} | {f"{name}_cpu": run[0] for name, run in runs.items()}
    limits = {
        (script, bar["limit"])
        for name, script in files.items()
        for bar in json.loads((RESULTS / f"{name}.json").read_text())["bars"]
    }
    assert limits == {(text.split()[0], limit) for text, limit in scripts_of_the_table()}


def test_undecided_and_failed_bars_are_named():
    text = page("benchmarks")
    words = ("none", "One", "Two", "Three", "Four", "Five", "Six")
    undecided = 0
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        for bar in found.get("bars", ()) if isinstance(found, dict) else ():
            if bar["verdict"] == "pass":
                continue
            value, *ends = (bar[key] for key in ("value", "low", "high"))
            low, high = (f"{end:.3f}" for end in ends)
            if "score=" in bar["name"]:
                score = re.search(r"score=(\S+)", bar["name"])[1]
                assert f"`{score}` {value:.2%} [{ends[0]:.2%}, {ends[1]:.2%}]" in text
            else:
                assert re.search(rf"{value:.3f} \[{low}, {high}\].{{,60}}?{bar['verdict']}", text)
            undecided += bar["verdict"] == "undecided"
    assert f"{words[undecided]} are undecided" in text


def test_costs_of_scores():
    bars = {re.search(r"score=(\S+)", b["name"])[1]: b for b in record("score_cost")["bars"]}
    assert {bar["verdict"] for bar in bars.values()} == {"pass"}
    text, _, others = (
        page("benchmarks")
        .partition("`score_cost.py`, 60 rounds")[2]
        .partition(": pass. All others pass, ")
    )
    rows = re.findall(r"`([\w:.-]+)` (-?[\d.]+%) \[(-?[\d.]+%), (-?[\d.]+%)\]", text)
    assert len(rows) == 3
    for name, *figures in rows:
        assert figures == [f"{bars[name][key]:.2%}" for key in ("value", "low", "high")]
    named = {name for name, *_ in rows}
    medians = [bar["value"] for name, bar in bars.items() if name not in named]
    ends = re.match(r"with medians between (\S+)% and (\S+)%", others)
    assert [float(end) for end in ends.groups()] == [
        round(100 * end, 1) for end in (min(medians), max(medians))
    ]


def test_figures_of_an_assignment():
    text, benchmarks, found = page("hybrid"), page("benchmarks"), record("hybrid")
    peaks = {
        (tokens, dtype): [settings[f"{x}, {dtype}"]["measured"] for x in ("hybrid", "fft")]
        for tokens, settings in found["peak_bytes"].items()
        for dtype in ("float32", "bfloat16")
    }
    ratios = {key: f"{own / fft:.2f}" for key, (own, fft) in peaks.items()}
    short, long = ([ratios[n, dtype] for dtype in ("float32", "bfloat16")] for n in ("32", "2048"))
    assert f"{short[0]} of full fine-tuning's in float32 and {short[1]} in bfloat16" in text
    assert f"At 2,048 tokens activations decide, and the peak is {long[0]} and {long[1]}" in text
    for tokens, (first, second) in (("32", short), ("2,048", long)):
        line = f"The peak at {tokens} tokens is {first} (float32) and {second} (bfloat16)"
        assert line in benchmarks
    seconds = found["seconds"]
    for method in ("molf", "lora", "hybrid"):
        pairs = zip(seconds[method], seconds["fft"], strict=True)
        shown = text.partition("## Cost ")[2].partition(f"| `{method}`")[2][:40]
        assert f" {median(a / b for a, b in pairs):.2f} |" in shown
    for number, name in enumerate(("hybrid", "fft")):
        shown = [f"{peaks['32', x][number] / 2**20:.0f} MiB" for x in ("float32", "bfloat16")]
        assert " | ".join(shown) in text.partition("## Cost ")[2].partition(f"| `{name}`")[2][:60]
    without = record("hybrid_without_keep_memory")["bars"][0]
    assert without["verdict"] == "fail"
    assert (
        f"Without it a step of `hybrid` takes {without['value']:.2f} of full fine-tuning's" in text
    )
    kept = median(a / b for a, b in zip(seconds["hybrid"], seconds["fft"], strict=True))
    assert (
        f"a step takes {without['value']:.2f} of the time of full fine-tuning ({kept:.2f} with "
        f"`--keep_memory`). Weights and states take {short[0]} of the memory in float32; with "
        f"2,048 tokens a step, activations included, the peak is {long[0]} "
    ) in " ".join((ROOT / "README.md").read_text().split())


def test_figures_of_a_probe():
    text, benchmarks, found = page("advise"), page("benchmarks"), record("probe")
    own, high, low = found["peaks"].values()
    assert (
        f"a peak of {own:.1f} bytes per parameter. Full fine-tuning of bfloat16 weights has "
        f"{high:.1f} with float32 moments, and {low:.1f} with torch's bfloat16 moments. The "
        f"probe's peak is {own / high:.2f} of the former and {own / low:.2f} of the latter."
    ) in text
    assert f"The peak is {own / high:.2f} of full fine-tuning's with float32 moments" in benchmarks
    assert f"It is {own / low:.2f} of that with torch's bfloat16 moments" in benchmarks
    bar = next(bar for bar in found["bars"] if "30 steps" in bar["name"])
    value, low, high = (bar[key] for key in ("value", "low", "high"))
    assert f"take {value:.1%} ({100 * low:.1f} - {high:.1%}) of 1,000 steps" in text
    assert f"take {value:.3f} [{low:.3f}, {high:.3f}] of 1,000 steps with four" in benchmarks
    seconds = found["seconds"]["float32"]
    pairs = zip(seconds["probe"], seconds["hybrid, one batch a step"], strict=True)
    share = median(30 * a / (1000 * b) for a, b in pairs)
    assert f"and {share:.1%} (" in text
    assert f"With one batch a step they take {share:.3f} [" in benchmarks
