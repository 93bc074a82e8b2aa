"""Plant faults in the optimizer, one at a time, and check that the core tests catch each.

A fault (`scripts/faults`) replaces functions of molf.core by name, in the process that runs the
tests; no file is changed.

    python scripts/planted_faults.py              # all faults, a quarter of an hour
    python scripts/planted_faults.py NAME ...     # some of them
    python scripts/planted_faults.py --check      # only check that the targets exist

Exits with 1 if a fault survives or a target does not exist.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  (imported here once for all forks)
import peft  # noqa: F401
import pytest
from transformers import AutoModelForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests" / "core"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "src")]

from faults import FAULTS, VARIABLE, Fault, TargetError, find  # noqa: E402


class HarnessError(Exception):
    """The tests did not run, or fail without a fault."""


def run_tests(tests: str, fault: str = "") -> tuple[bool, str]:
    """Run tests with a fault, in a fork; return whether they pass, and the first that fails.

    Raises:
        HarnessError: The tests did not run, so they caught nothing.
    """
    options = ["-x", "-q", "-rfE", "--tb=no", "--no-header", "--hypothesis-profile=no-shrink"]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "faults"]
    options += ["-W", "ignore:Module already imported", f"--rootdir={ROOT}"]
    with tempfile.TemporaryFile("w+") as output:
        # A fork, because importing torch and transformers takes longer than most tests.
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.environ[VARIABLE] = fault
            code = int(pytest.ExitCode.INTERNAL_ERROR)
            try:
                code = pytest.main([*options, *(str(TESTS / test) for test in tests.split())])
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        text = output.read()
    result = os.waitstatus_to_exitcode(status)
    if result not in (0, 1):
        raise HarnessError(f"pytest exits with {result}: {text[-800:]}")
    failed = re.search(r"^(?:FAILED|ERROR) \S*?([\w.]+::\S+)", text, re.MULTILINE)
    return result == 0, failed[1] if failed else ""


def try_fault(fault: Fault) -> str:
    """Plant one fault; return the test that caught it, or an empty text."""
    passed, test = run_tests(fault.tests, fault.name)
    return "" if passed else test


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Plant faults and check that tests catch them.")
    parser.add_argument("names", nargs="*", help="faults to plant (default: all)")
    parser.add_argument("--check", action="store_true", help="only check that the targets exist")
    options = parser.parse_args()
    unknown = set(options.names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    faults = [fault for fault in FAULTS if not options.names or fault.name in options.names]

    wrong = 0
    if not options.check:
        for test in dict.fromkeys(test for fault in faults for test in fault.tests.split()):
            passed, failed = run_tests(test)
            if not passed:
                raise HarnessError(f"without any fault, {failed} fails")
    print(f"{'fault':55} caught by")
    for fault in faults:
        started = time.perf_counter()
        try:
            for target in fault.targets:
                find(target)
            result = "(exists)" if options.check else try_fault(fault) or "NOTHING: IT SURVIVES"
        except (TargetError, HarnessError) as error:
            result = f"ERROR: {error}"
        wrong += result.startswith(("NOTHING", "ERROR"))
        print(f"{fault.name:55} {result}  [{time.perf_counter() - started:.1f} s]", flush=True)
    print(f"{len(faults) - wrong} of {len(faults)} faults are as expected.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
