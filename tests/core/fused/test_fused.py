"""Runs the checks of the fused kernels, those that interpret them in one process of its own.

Triton decides when it is imported whether kernels are interpreted (TRITON_INTERPRET), so one
process cannot both interpret and compile them, nor share either with other tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "checks"
INTERPRETED = ["check_operations.py", "check_storage.py", "check_step.py"]
INTERPRETED += ["check_optimizer.py", "check_command.py"]
INVARIANTS = "../../test_invariants.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (extra `triton`)"
)


def run_checks(names: list[str], *options: str, interpret: bool, cache: Path) -> None:
    """Run files of checks; every one must pass, and there must be some."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["TRITON_CACHE_DIR"] = str(cache)
    helpers = str(CHECKS.parents[1])  # core_helpers
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (helpers, os.environ.get("PYTHONPATH"))))
    if interpret:
        variables["TRITON_INTERPRET"] = "1"
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", *options)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(CHECKS / name) for name in names)],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", last), done.stdout
    assert "skipped" not in last, done.stdout


@pytest.mark.slow
def test_interpreted_on_the_cpu(tmp_path, monkeypatch):
    """The checks, and the table of invariants with the kernels in place of other executors.

    One process: the imports of each would take longer than most of its checks.
    """
    monkeypatch.setenv("MOLF_TEST_EXECUTOR", "triton")
    # Not all invariants, because the interpreter is slow.
    rows = "steps_are or exact_bfloat16 or bad_gradient or moves_between or copies or depends_on"
    chosen = f"check_ or (triton and ({rows}))"
    run_checks([*INTERPRETED, INVARIANTS], "-k", chosen, interpret=True, cache=tmp_path)


@pytest.mark.gpu
def test_invariants_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLF_TEST_EXECUTOR", "triton")
    run_checks([INVARIANTS], "-k", "triton", interpret=False, cache=tmp_path)


@pytest.mark.slow
def test_every_variant_compiles_for_sm_90(tmp_path):
    run_checks(["check_compile.py"], interpret=False, cache=tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("name", INTERPRETED)
def test_on_a_gpu(name, tmp_path):
    run_checks([name], interpret=False, cache=tmp_path)


def test_no_file_of_checks_is_forgotten():
    files = {path.name for path in CHECKS.glob("check_*.py")}
    assert files == {*INTERPRETED, "check_compile.py"}


def test_eager_steps_do_not_import_the_kernels():
    code = (
        "import sys, torch, molf; p = torch.nn.Parameter(torch.ones(3)); p.grad = p.detach()\n"
        "molf.AdamW([p], kernels='eager').step(); molf.trainer_optimizer(lr=1, kernels='triton')\n"
        "molf.MoLFAdamW; sys.exit('molf.core.execute.triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def benchmark(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[3] / "benchmarks" / name
    variables = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, script, *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "more"),
    [("step_kernels_gpu", ""), ("gpu", " (--smoke runs tiny models on a CPU)")],
)
def test_benchmarks_end_with_one_line_without_a_gpu(name, more):
    done = benchmark(f"{name}.py")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"{name}: needs a CUDA device, and there is none{more}.\n"


@pytest.mark.slow
def test_all_paths_of_the_gpu_benchmark_on_a_cpu(tmp_path):
    pytest.importorskip("torchao")
    done = benchmark("gpu.py", "--smoke", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    methods = found["models"]["tiny"]
    assert list(methods) == ["fft", "fft-torch", "lora", "molf", "molf-eager", "molf-e"]
    assert all(len(method["seconds"]) == 2 for method in methods.values())
    assert methods["fft"]["ratio"] == [1, 1, 1]
    assert sum(methods["molf"]["winners"].values()) == pytest.approx(1)
    count = found["capped"]["tiny"]["parameters"]
    assert methods["fft"]["floor_bytes"] == 26 * count  # as docs/kernels.md has it
    assert methods["molf"]["floor_bytes"] > 28 * 0.8 * count
    assert found["capped"]["tiny"]["fits"]
    assert "pass" not in done.stdout
    assert "fail" not in done.stdout
