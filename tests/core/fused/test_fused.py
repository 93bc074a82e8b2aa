"""Runs the checks of the fused kernels, each file in a process of its own.

Triton decides when it is imported whether kernels are interpreted (TRITON_INTERPRET), so one
process cannot both interpret and compile them, nor share either with other tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "checks"
INTERPRETED = ["check_operations.py", "check_storage.py", "check_step.py"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (extra `triton`)"
)


def run_checks(name: str, *, interpret: bool, cache: Path) -> None:
    """Run a file of checks; every one must pass, and there must be some."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(cache)
    if interpret:
        variables["TRITON_INTERPRET"] = "1"
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CHECKS / name)],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", last), done.stdout
    assert "skipped" not in last, done.stdout


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_on_the_cpu(name, tmp_path):
    run_checks(name, interpret=True, cache=tmp_path)


def test_every_variant_compiles_for_sm_90(tmp_path):
    run_checks("check_compile.py", interpret=False, cache=tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETED)
def test_on_a_gpu(name, tmp_path):
    run_checks(name, interpret=False, cache=tmp_path)


def test_no_file_of_checks_is_forgotten():
    files = {path.name for path in CHECKS.glob("check_*.py")}
    assert files == {*INTERPRETED, "check_compile.py"}


def test_the_core_does_not_import_triton():
    code = "import sys, molf; molf.MoLFAdamW; sys.exit('molf.core.fused' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_benchmark_ends_with_one_line_without_a_gpu():
    script = Path(__file__).parents[3] / "benchmarks" / "step_kernels_gpu.py"
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=variables, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "step_kernels_gpu: needs a CUDA device, and there is none.\n"
