import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_sql.py"
RECORDS = SCRIPT.parents[2] / "shared" / "data" / "text_to_sql.jsonl"
SEED = 0


@pytest.fixture(scope="module")
def fuzz_sql():
    spec = importlib.util.spec_from_file_location("fuzz_sql", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fuzz_sql", module)  # dataclasses look it up
        spec.loader.exec_module(module)
        yield module


def test_queries_are_a_function_of_the_seed(fuzz_sql):
    first = list(fuzz_sql.hostile_pairs(200, seed=3))
    assert first == list(fuzz_sql.hostile_pairs(200, seed=3))
    assert first != list(fuzz_sql.hostile_pairs(200, seed=4))
    assert len(set(first)) > 150


def test_built_in_queries_run(fuzz_sql):
    figures = fuzz_sql.fuzz(iter(fuzz_sql.BUILT_IN))
    assert figures.outcomes == {"ok": len(fuzz_sql.BUILT_IN)}


@pytest.mark.slow
def test_everything_is_contained(fuzz_sql, tmp_path, monkeypatch, capsys, memory_growth):
    real = list(fuzz_sql.BUILT_IN)
    if RECORDS.exists():
        real += fuzz_sql.read_pairs(RECORDS)
    monkeypatch.chdir(tmp_path)
    figures = fuzz_sql.fuzz(fuzz_sql.hostile_pairs(1000, SEED, real))
    with capsys.disabled():
        sys.stdout.write(f"\n{asdict(figures)}\n")
    assert figures.contained == figures.tried == 1000
    assert figures.files == []
    assert memory_growth() < 500 * 2**20
    # Otherwise the queries would be too tame, or too broken to get anywhere.
    assert figures.outcomes["ok"] > 200
    assert {"sql", "denied", "time", "size"} <= figures.outcomes.keys()
