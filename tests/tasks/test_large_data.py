"""Memory of large data: records are neither held as objects nor twice."""

import json
import pickle
import time
import tracemalloc

import numpy  # noqa: F401 (not in the measured memory)
import pyarrow
import pyarrow.parquet
import pytest

from molf.data import sample_store
from molf.data.sample_store import SampleStore
from molf.data.samples import PlainText, PromptCompletion
from molf.data.selection import weighted
from molf.errors import InputError
from molf.tasks import TaskOptions, load_task
from molf.tasks.math import MATH
from molf.tasks.questions import load_questions
from molf.tasks.validation import with_validation

COUNT = 3000


def record(i, layout):
    question, answer = f"{i} " + "where is it? " * 15, " in the town of Paris" * 12
    if layout == "pairs":
        return {"prompt": question, "completion": answer}
    roles = zip(("user", "assistant"), (question, answer), strict=True)
    return {"messages": [{"role": role, "content": text} for role, text in roles]}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("jsonl", "pairs"), ("jsonl", "chat"), ("json", "pairs"), ("csv", "pairs")],
)
def test_little_of_a_large_file_is_in_memory(tmp_path, monkeypatch, kind, layout):
    """Peak of Python's memory; a list of the records has more than twice the file's size."""
    monkeypatch.setattr(sample_store, "_MOST_IN_MEMORY", 2**16)
    monkeypatch.setattr("molf.data.json_records._WINDOW", 2**16)
    path = tmp_path / f"a.{kind}"
    with path.open("w") as file:
        file.write({"jsonl": "", "json": "[", "csv": "prompt,completion\n"}[kind])
        for i in range(COUNT):
            one = record(i, layout)
            line = ",".join(one.values()) if kind == "csv" else json.dumps(one)
            file.write("," * (kind == "json" and i > 0) + line + "\n")
        file.write("]" * (kind == "json"))
    options = TaskOptions(name="custom", data=str(path))
    tracemalloc.start()
    try:
        task = with_validation(load_task(options), options, load_task)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size
    found = json.dumps(record(task.training_samples[9].record, layout))
    assert task.training_samples[9].answer.strip() in found


def test_weights_of_many_files_take_no_search_of_all_records_for_each():
    files = [(range(start, start + 10), 1.5) for start in range(0, 30_000, 10)]
    started = time.process_time()
    assert len(weighted(list(range(30_000)), files, seed=1)) == 45_000
    assert time.process_time() - started < 1


def test_records_held_out_of_many_are_looked_up_at_once(monkeypatch):
    monkeypatch.setattr("molf.data.selection.HELD_OUT_MOST", 5000)
    splits = {"train": [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(50_000)]}
    started = time.process_time()
    found = load_questions(TaskOptions(name="math", few_shot=1), MATH, splits)
    assert time.process_time() - started < 3
    assert (len(found.held_out), len(found.pool)) == (5000, 45_000)


def test_rows_of_tables_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_store, "_MOST_IN_MEMORY", 2**12)
    monkeypatch.setattr("molf.data.files._ROWS", 7)
    rows = [record(i, "pairs") for i in range(40)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=11)
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=11)
    with pyarrow.ipc.new_stream(tmp_path / "c.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=11)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        options = TaskOptions(name="custom", data=str(tmp_path / name), preview=True)
        samples = load_task(options).data_records().samples
        assert [(x.prompt, x.completion) for x in samples.values()] == [
            (one["prompt"], one["completion"]) for one in rows
        ]


def test_samples_in_the_temporary_file_are_those_in_memory(monkeypatch):
    monkeypatch.setattr(sample_store, "_MOST_IN_MEMORY", 300)
    samples = [PromptCompletion(f"{i}", "x" * i, 2 * i) for i in range(50)]
    store = SampleStore()
    for sample in samples:
        store.add(sample)
    assert list(store) == [sample.record for sample in samples]
    assert list(store.values()) == samples
    assert (2 in store, 3 in store, 100 in store) == (True, False, False)
    # Other processes get the content, where they are not forked.
    assert list(pickle.loads(pickle.dumps(store)).values()) == samples
    monkeypatch.delattr("os.pread")  # as on Windows
    assert list(store.values()) == samples


def test_a_full_temporary_folder_is_one_clear_line(tmp_path, monkeypatch):
    def full(**given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample_store, "_MOST_IN_MEMORY", 300)
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record(i, "pairs")) + "\n" for i in range(3)))
    with pytest.raises(InputError, match=r"No space left on device.* Set TMPDIR to") as error:
        load_task(TaskOptions(name="custom", data=str(path)))
    assert "\n" not in str(error.value)


def test_no_temporary_folder_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(sample_store, "_MOST_IN_MEMORY", 10)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(InputError, match=r"No usable temporary directory .* Set TMPDIR to"):
        SampleStore().add(PlainText("a long text", 0))
