"""`scripts/first_gpu_run.sh` on a CPU: every part runs, and a part that fails is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = [
    "environment",
    "tests",
    "train-fft",
    "train-molf",
    "train-molf-eager",
    "train-molf-offload",
    "train-molf-e",
    "world-of-one",
    "bench",
    "bench-24gb",
]


def run(folder, python=sys.executable):
    script = ROOT / "scripts" / "first_gpu_run.sh"
    variables = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", script, "--cpu", folder], env=variables, capture_output=True, text=True
    )
    return done, [
        line.partition(": ") for line in (folder / "summary.txt").read_text().splitlines()
    ]


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path):
    done, summary = run(tmp_path)
    assert [name for name, _, _ in summary] == PARTS, done.stdout
    assert all(result.startswith("ok, ") for _, _, result in summary), done.stdout
    assert done.returncode == 0
    assert "largest difference" in (tmp_path / "world-of-one.log").read_text()
    for name, full, empty in (("gpu", "models", "capped"), ("gpu-24gb", "capped", "models")):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert (list(found[full]), found[empty]) == (["tiny"], {})


def test_failed_parts_do_not_stop_the_others(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho broken; exit 7\n")
    broken.chmod(0o755)
    done, summary = run(tmp_path / "out", broken)
    assert done.returncode == 1
    assert [name for name, _, _ in summary] == PARTS
    assert all(result.startswith("failed with exit code 7, ") for _, _, result in summary)
    assert done.stdout.count("broken") == len(PARTS)
