"""Files and directories appear whole or not at all."""

import csv
from concurrent.futures import ThreadPoolExecutor

import pytest

from molf.errors import InputError
from molf.train.files import replacing_directory, replacing_file, write_json
from molf.train.results import append_result
from molf.train.run_directory import RunDirectory, check_output


class BrokenError(Exception):
    """What a block fails with."""


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_file_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 2\n}\n'
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_failed_file_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with replacing_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_file_whose_writer_never_began(tmp_path):
    with pytest.raises(BrokenError), replacing_file(tmp_path / "a.txt"):
        raise BrokenError
    assert names(tmp_path) == []


@pytest.mark.parametrize("there_before", [False, True])
def test_directory_is_replaced(tmp_path, there_before):
    path = tmp_path / "model"
    if there_before:
        path.mkdir()
        (path / "old").touch()
    with replacing_directory(path) as temporary:
        (temporary / "new").touch()
        assert names(tmp_path)[-1] == ("model" if there_before else temporary.name)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
def test_failed_directory_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()

    def write():
        with replacing_directory(path) as temporary:
            (temporary / "half").touch()
            raise error

    with pytest.raises(error):
        write()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]


def test_run_directory_is_made_with_its_parents(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "b", overwrite=False)
    assert directory.path.is_dir()
    assert directory / "x" == tmp_path / "a" / "b" / "x"


def test_an_empty_directory_is_taken(tmp_path):
    check_output(tmp_path, overwrite=False)
    assert RunDirectory(tmp_path, overwrite=False).replaced is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_taken(tmp_path, overwrite):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="overwrite"):
        RunDirectory(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == ["thesis.tex"]


def test_replaced_run_is_kept_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("first")
    (tmp_path / "run.replaced-1").mkdir()  # of a run that failed before
    directory = RunDirectory(path, overwrite=True)
    assert names(path) == []
    assert directory.replaced == tmp_path / "run.replaced-2"
    assert (directory.replaced / "config.yaml").read_text() == "first"
    directory.complete()
    assert names(tmp_path) == ["run", "run.replaced-1"]


def test_discarded_run_brings_the_earlier_one_back(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("first")
    directory = RunDirectory(path, overwrite=True)
    (directory / "config.yaml").write_text("second")
    directory.discard()
    assert names(tmp_path) == ["run"]
    assert (path / "config.yaml").read_text() == "first"


def read_results(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_results_take_new_columns(tmp_path):
    path = tmp_path / "results.csv"
    append_result(path, {"run": "a", "es": 0.5})
    append_result(path, {"run": "b, c", "accuracy": 0.25})
    assert path.read_text().splitlines()[0] == "run,es,accuracy"
    assert read_results(path) == [
        {"run": "a", "es": "0.5", "accuracy": ""},
        {"run": "b, c", "es": "", "accuracy": "0.25"},
    ]


def test_runs_that_finish_together_lose_no_row(tmp_path):
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: append_result(path, {"run": i}), range(20)))
    assert {row["run"] for row in read_results(path)} == {str(i) for i in range(20)}
