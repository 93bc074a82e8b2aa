import importlib.util
import sys
from pathlib import Path

import pytest

from tiny_models import CHATML, byte_level_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_records.py"


@pytest.fixture(scope="module")
def fuzz_records():
    spec = importlib.util.spec_from_file_location("fuzz_records", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fuzz_records", module)  # dataclasses look it up
        spec.loader.exec_module(module)
        yield module


def chat_tokenizer():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def test_good_records_are_used(fuzz_records):
    cases = [
        (task, suffix, [record] * 3)
        for task, records in fuzz_records.GOOD.items()
        for record in records
        for suffix in ("jsonl", "json", "parquet")
    ]
    figures = fuzz_records.fuzz(iter(cases), chat_tokenizer())
    assert figures.faults == []
    assert figures.outcomes.total() == len(cases)
    assert all(name.endswith(" used") for name in figures.outcomes)


def test_odd_records_are_used_left_out_or_refused_by_one_line(fuzz_records):
    figures = fuzz_records.fuzz(fuzz_records.odd_records(2000, seed=0), chat_tokenizer())
    assert figures.faults == []
    assert figures.tried > 1700  # the others cannot be written in their format
    for suffix in ("jsonl", "json", "parquet"):
        assert all(figures.outcomes[f"{suffix} {x}"] > 5 for x in ("used", "left out", "refused"))
    assert figures.outcomes["csv refused"] > 50
