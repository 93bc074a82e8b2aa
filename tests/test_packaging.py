"""The wheel holds all it imports and ships, and trains in an environment of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
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


@pytest.fixture(scope="module")
def torch_alone(wheel, tmp_path_factory) -> Path:
    """A folder with molf, torch and torch's requirements, as `pip install molf` gives them."""
    folder = tmp_path_factory.mktemp("packages")
    zipfile.ZipFile(wheel).extractall(folder)
    found: dict[str, Distribution] = {}
    missing = ["torch"]
    while missing:
        name = missing.pop()
        with suppress(PackageNotFoundError):
            found[name] = distribution(name)
            missing += [
                required
                for entry in found[name].requires or ()
                if "extra ==" not in entry
                and (required := re.split(r"[ ;<>=!~\[(]", entry)[0]) not in found
            ]
    for one in found.values():
        for top in {file.parts[0] for file in one.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(one.locate_file(top))
    return folder


@pytest.mark.parametrize(
    ("code", "returned", "printed"),
    [
        (
            "layer = torch.nn.Linear(8, 8)\n"
            "optimizer = molf.MoLFAdamW.from_model("
            "torch.nn.Sequential(layer), molf.MoLFConfig(ranks=(2,)), lr=1e-3)\n"
            "layer(torch.ones(4, 8)).sum().backward()\n"
            "optimizer.step()\n"
            "optimizer.load_state_dict(optimizer.state_dict())\n"
            "print(molf.Assignment.of(optimizer), molf.__version__)",
            0,
            "1 layer: ",
        ),
        (
            "molf.with_adapter(torch.nn.Sequential(torch.nn.Linear(8, 8)), "
            "molf.MoLFConfig(ranks=(2,), freeze_base=True))",
            1,
            "An adapter needs peft, which is not installed: pip install 'molf[train]'.\n",
        ),
        (
            "import sys; from molf.cli import main; sys.exit(main(['train']))",
            2,
            "molf: error: The command molf needs cyclopts, which is not installed: "
            "pip install 'molf[train]'.\n",
        ),
    ],
    ids=["optimizer", "adapter", "command"],
)
def test_torch_is_enough_for_the_optimizer(torch_alone, tmp_path, code, returned, printed):
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import molf, torch\n{code}"],
        env=os.environ | {"PYTHONPATH": str(torch_alone)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == returned, done.stderr
    assert printed in done.stdout + done.stderr


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
            if name not in ("torch", "triton", "wandb", "mlflow", "trackio"):
                assert floors[name] == f"{name}=={version}"
    lock = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert floors["torch"] in lock
    assert "pytest>=8" in shown
    minor = project["requires-python"].removeprefix(">=3.")
    assert pyproject["tool"]["ruff"]["target-version"] == f"py3{minor}"
    assert pyproject["tool"]["mypy"]["python_version"] == f"3.{minor}"
    assert f"Python 3.{minor} or later" in (ROOT / "README.md").read_text()
