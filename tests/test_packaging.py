"""The wheel holds all it imports and ships, and trains in an environment of its own."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "molf"
IMPORT_NAMES = {"PyYAML": "yaml"}  # where the module is not called like its distribution


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind that later wheels would hold
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source],
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_file_of_the_package(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("molf/")}
    source = {
        "molf/" + path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == source


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(name for extra in extras for name in extra)]
    declared = {name.split(">")[0].split("[")[0] for name in requirements}
    allowed = {IMPORT_NAMES.get(name, name) for name in declared}
    imported = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                imported.add(node.module.partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"molf"}
    assert foreign <= allowed, f"imported but not declared: {sorted(foreign - allowed)}"


@pytest.mark.slow
def test_wheel_trains_in_a_clean_environment(wheel, tmp_path):
    # The dependencies are lent by path, which does not lend the development install of molf.
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    binaries = environment / "bin"
    subprocess.run(
        [binaries / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    variables = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    where = subprocess.run(
        [binaries / "python", "-c", "import molf; print(molf.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        env=variables,
        cwd=tmp_path,
    )
    assert str(environment) in where.stdout

    output = tmp_path / "run"
    options = f"--max_steps 2 --max_samples 20 --output_dir {output}"
    subprocess.run(
        [binaries / "molf", "train", *options.split()],
        check=True,
        env=variables,
        cwd=tmp_path,
    )
    evaluation = json.loads((output / "eval.json").read_text())
    assert evaluation["task"] == "demo-fact"
    assert (output / "model" / "model.safetensors").is_file()


def test_every_requirement_has_a_floor_to_be_tested_at():
    shown = subprocess.run(
        [sys.executable, ROOT / "scripts" / "floors.py"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    floors = {line.partition("==")[0]: line for line in shown if "==" in line}
    for extra in (project["dependencies"], *project["optional-dependencies"].values()):
        for requirement in extra:
            name, _, version = requirement.partition(">=")
            if name not in ("torch", "triton", "wandb", "trackio"):
                assert floors[name] == f"{name}=={version}"
    lock = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert floors["torch"] in lock
    assert "pytest>=8" in shown
    minor = project["requires-python"].removeprefix(">=3.")
    assert pyproject["tool"]["ruff"]["target-version"] == f"py3{minor}"
    assert pyproject["tool"]["mypy"]["python_version"] == f"3.{minor}"
    assert f"Python 3.{minor} or later" in (ROOT / "README.md").read_text()
