"""The table of runs: rows of ours, and files of others."""

import csv
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from molf.cli import main
from molf.job.record import results
from molf.job.record.results import append_result, check_results

COLUMNS = "run,started,task,method,model,seed,training_loss,peak_memory_bytes"


def row(run, **figures):
    fixed = dict.fromkeys(COLUMNS.split(","), "x")
    return {**fixed, "run": run, **figures}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_new_columns_are_added_at_the_right(tmp_path):
    append_result(tmp_path, row("a", es=0.5))
    path = append_result(tmp_path, row("b, c", accuracy=0.25))
    assert path == tmp_path / "results.csv"
    assert path.read_text().splitlines()[0] == f"{COLUMNS},es,accuracy"
    found = [(r["run"], r["es"], r["accuracy"]) for r in read(path)]
    assert found == [("a", "0.5", ""), ("b, c", "", "0.25")]


def test_runs_that_finish_together_lose_no_row(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_result(tmp_path, row(i)), range(20)))
    assert {r["run"] for r in read(tmp_path / "results.csv")} == {str(i) for i in range(20)}


def test_a_run_has_one_row(tmp_path):
    for es, run in enumerate("aba"):
        path = append_result(tmp_path, row(run, es=es))
    assert [(r["run"], r["es"]) for r in read(path)] == [("b", "1"), ("a", "2")]


def test_a_table_from_a_spreadsheet_keeps_its_columns(tmp_path):
    path = tmp_path / "results.csv"
    path.write_bytes(b"\xef\xbb\xbf" + f"mine,{COLUMNS}\r\nnote,a\r\n".encode())
    path.chmod(0o640)
    append_result(tmp_path, row("b", es=2))
    assert [(r["run"], r["mine"]) for r in read(path)] == [("a", "note"), ("b", "")]
    assert path.stat().st_mode & 0o777 == 0o640


FOREIGN = [
    (b"run,mine\na,1\n", "does not name the columns of runs"),
    (b"run,task,method,model,seed,loss\na,b,c,d,1,2\n", "does not name the columns of runs"),
    (f"{COLUMNS},run\n".encode(), "each once"),
    (COLUMNS.replace(",", ";").encode(), "does not name the columns of runs"),
    (b"", "does not name the columns of runs"),
    (f"{COLUMNS}\n1,2,3,4,5,6,7,8,9\n".encode(), "line 2 has 9 cells for 8 columns"),
    (f"{COLUMNS}\n\xe9,b\n".encode("latin-1"), "'utf-8' codec can't decode"),
    (f'{COLUMNS}\n"a'.encode(), "unexpected end of data"),
    (None, "it is no file"),
]


@pytest.mark.parametrize(("content", "fault"), FOREIGN)
def test_what_is_not_ours_stays_as_it_is(tmp_path, content, fault):
    path = tmp_path / "results.csv"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (tmp_path / "results.molf.csv").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match=r"results\.csv is not a table of molf's runs") as warned:
        check_results(tmp_path)
    assert len(warned) == 1
    assert fault in str(warned[0].message)
    assert "the run's row goes to results.molf-2.csv" in str(warned[0].message)
    for run in "ab":
        assert append_result(tmp_path, row(run)) == tmp_path / "results.molf-2.csv"
    assert [r["run"] for r in read(tmp_path / "results.molf-2.csv")] == ["a", "b"]
    assert (content is None and path.is_dir()) or path.read_bytes() == content
    assert not (tmp_path / ".results.csv.lock").exists()


def test_no_warning_where_nothing_is_wrong(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_results(tmp_path / "not-there-yet")
        check_results(tmp_path)
        append_result(tmp_path, row("a"))
        check_results(tmp_path)


def test_a_linked_table_stays_a_link(tmp_path):
    (tmp_path / "shared").mkdir()
    append_result(tmp_path / "shared", row("a"))
    (tmp_path / "results.csv").symlink_to(tmp_path / "shared" / "results.csv")
    append_result(tmp_path, row("b"))
    assert (tmp_path / "results.csv").is_symlink()
    assert [r["run"] for r in read(tmp_path / "shared" / "results.csv")] == ["a", "b"]


def test_a_table_of_others_does_not_stop_a_training(options, tmp_path, capsys):
    path = tmp_path / "results.csv"
    path.write_text("run,score\nbaseline,0.5\n")
    assert main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("results.csv is not a table of molf's runs") == 1
    assert f"compare  {tmp_path / 'results.molf.csv'}" in captured.out
    assert path.read_text() == "run,score\nbaseline,0.5\n"
    assert [r["run"] for r in read(tmp_path / "results.molf.csv")] == ["run"]


def test_a_lock_that_nobody_gives_back_does_not_hold_a_run(monkeypatch, options, tmp_path, capsys):
    monkeypatch.setattr(results, "LOCK_SECONDS", 0.1)
    with FileLock(tmp_path / ".results.csv.lock"):
        assert main([*options, "--output_dir", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "its row was not added to a table in" in captured.err
    assert "has held" in captured.err
    assert "compare" not in captured.out
    assert Path(tmp_path / "run" / "eval.json").is_file()
