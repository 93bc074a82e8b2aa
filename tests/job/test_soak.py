"""A long training does not grow; `benchmarks/soak.py` has the run of 2,000 steps."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_memory_and_open_files_stay_and_logs_are_complete(tmp_path):
    record = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--steps", "400", "--json", str(record)]
    command += ["--without-time"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(record.read_text())
    assert found["growth"] <= 1.01
    assert found["files_at_the_end"] <= found["files_after_a_quarter"]
    assert found["objects"][3] <= found["objects"][1] + 100
    assert found["logs_are_complete"]


@pytest.fixture
def slowdown(monkeypatch):
    monkeypatch.syspath_prepend(str(SOAK.parent))
    from soak import slowdown

    return slowdown


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(("growth", "is_flat"), [(0.0, True), (0.4, False)])
def test_slower_steps_are_found_beside_noise_and_checkpoints(slowdown, noise, growth, is_flat):
    draw = random.Random(0)
    steps = range(2000)
    seconds = [
        (0.09 + 0.5 * (n % 100 == 99)) * (1 + growth * n / 2000) * draw.lognormvariate(0, noise)
        for n in steps
    ]
    ratio, bar = slowdown(seconds)
    assert 1.05 <= bar < 1.12
    assert (ratio <= bar) == is_flat
    # Half a growth of the run lies between the two quarters.
    assert ratio == pytest.approx((1 + growth * 0.875) / (1 + growth * 0.375), rel=0.03)
