"""A long training does not grow; `benchmarks/soak.py` has the run of 2,000 steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_memory_and_open_files_stay_and_logs_are_complete(tmp_path):
    record = tmp_path / "soak.json"
    command = [sys.executable, str(SOAK), "--steps", "400", "--json", str(record)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(record.read_text())
    assert found["growth"] <= 1.01
    assert found["files_at_the_end"] <= found["files_after_a_quarter"]
    assert found["objects"][3] <= found["objects"][1] + 100
    assert found["logs_are_complete"]
