"""The script that plants faults still works: its patches apply, and one fault is caught."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "planted_faults.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planted_faults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_patch_applies_to_the_present_code(script, tmp_path):
    assert len({fault.name for fault in script.FAULTS}) == len(script.FAULTS) >= 10
    for index, fault in enumerate(script.FAULTS):
        folder = tmp_path / str(index)
        folder.mkdir()
        script.plant(fault, script.copy_source(str(folder)))


def test_every_named_test_exists(script):
    for fault in script.FAULTS:
        for test in fault.tests.split():
            file, _, function = test.partition("::")
            assert f"def {function}" in (Path(__file__).parent / file).read_text()


def test_patch_that_does_not_apply_is_an_error(script, tmp_path):
    fault = script.Fault("stale", "test_twin.py", "adam.py", [("no such text", "")])
    with pytest.raises(script.PatchError, match="occurs 0 times"):
        script.plant(fault, script.copy_source(str(tmp_path)))


def test_one_fault_is_caught(script):
    fault = next(f for f in script.FAULTS if f.name == "ties go to the highest index")
    assert script.try_fault(fault).startswith("test_method_config.py::test_winners")
