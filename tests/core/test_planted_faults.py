"""The script that plants faults still works: its targets and tests exist, and faults are caught."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    import planted_faults

    return planted_faults


def test_every_target_and_test_exists(script):
    assert len({fault.name for fault in script.FAULTS}) == len(script.FAULTS) >= 80
    for fault in script.FAULTS:
        for target in fault.targets:
            script.find(target)
        for test in fault.tests.split():
            file, _, function = test.partition("::")
            assert f"def {function}" in (Path(__file__).parent / file).read_text(), test


def test_every_fault_replaces_what_it_names(script):
    for fault in script.FAULTS:
        values = [script.find(target)[2] for target in fault.targets]
        made = fault.replace(*values)
        replacements = made if len(values) > 1 else (made,)
        for value, new in zip(values, replacements, strict=True):
            kinds = (classmethod, staticmethod, property, float)
            assert [isinstance(new, kind) for kind in kinds] == [
                isinstance(value, kind) for kind in kinds
            ], fault.name
        assert any(new is not old for new, old in zip(replacements, values, strict=True))


@pytest.mark.parametrize(
    ("target", "times"), [("no_such_name", 0), ("AdamW.no_such_method", 0), ("fits", 2)]
)
def test_a_target_that_is_missing_or_ambiguous_is_an_error(script, target, times):
    with pytest.raises(script.TargetError, match=f"is defined {times} times"):
        script.find(target)


@pytest.mark.slow
def test_one_fault_is_caught():
    """In a process of its own: here the tests' helpers hold the functions already."""
    command = [sys.executable, SCRIPTS / "planted_faults.py", "ties go to the highest index"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_method_config.py::test_winners" in done.stdout


def test_tests_that_do_not_run_catch_nothing(script):
    with pytest.raises(script.HarnessError, match="pytest exits"):
        script.run_tests("no_such_file.py", "ties go to the highest index")
