"""The table of faults in docs/resume.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
TEXT = (TESTS.parent / "docs" / "resume.md").read_text(encoding="utf-8")


def test_each_row_of_the_table_of_faults_has_its_test():
    table = TEXT.split("## Faults")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 18
    existing = {
        name
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert existing.issuperset(named), row


def test_other_tests_that_are_named_exist():
    for name in re.findall(r"`(tests/[\w/.]+)`", TEXT):
        assert (TESTS.parent / name).is_file()
