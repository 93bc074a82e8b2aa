import json
import sys
from pathlib import Path

import pytest

RECORDS = Path(__file__).parents[3] / "shared" / "data" / "text_to_sql.jsonl"


@pytest.fixture
def real_records():
    if not RECORDS.exists():
        pytest.skip("needs the shared records of synthetic_text_to_sql")
    with RECORDS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def memory_growth():
    """By how many bytes this process's peak memory has grown since; 0 where nobody can tell."""
    if sys.platform != "linux":
        return lambda: 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = _peak_memory()
    return lambda: _peak_memory() - before


def _peak_memory():
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
