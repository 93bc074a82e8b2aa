"""Files and directories appear whole or not at all."""

import signal
import subprocess
import sys
import tempfile

import pytest

from molf.disk import files
from molf.disk.files import (
    clear_unfinished,
    replacing_directory,
    replacing_file,
    scratch_directory,
    write_first,
    write_json,
)
from molf.errors import InputError
from molf.job.record.directory import RunDirectory, check_output


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


@pytest.mark.parametrize("has_links", [True, False])
def test_the_first_of_several_writers_keeps_its_file(tmp_path, monkeypatch, has_links):
    def no_links(*_):
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(files.os, "link", no_links)
    for text in ("first", "second"):
        write_first(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text() == "first"
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


def write_run(path, seed=1):
    path.mkdir()
    (path / "config.yaml").write_text(f"method: molf\nseed: {seed}\nrun:\n  task: {{}}\n")
    (path / "environment.json").write_text("{}")


def test_replaced_run_is_kept_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "run"
    write_run(path)
    (tmp_path / "run.replaced-1").mkdir()  # of a run that failed before
    directory = RunDirectory(path, overwrite=True)
    assert names(path) == []
    assert directory.replaced == tmp_path / "run.replaced-2"
    assert "seed: 1" in (directory.replaced / "config.yaml").read_text()
    directory.complete()
    assert names(tmp_path) == ["run", "run.replaced-1"]


def test_discarded_run_brings_the_earlier_one_back(tmp_path):
    path = tmp_path / "run"
    write_run(path)
    directory = RunDirectory(path, overwrite=True)
    (directory / "config.yaml").write_text("second")
    directory.discard()
    assert names(tmp_path) == ["run"]
    assert "seed: 1" in (path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("config", "others", "fault"),
    [
        (None, ["environment.json"], "it has no config.yaml"),
        ("hello: 1\n", ["environment.json"], "not that of a run"),
        ("method: molf\nseed: 1\n", ["environment.json"], "not that of a run"),  # a recipe
        ("a: [\n", ["environment.json"], "not that of a run"),
        ("method: molf\nrun: {}\n", [], "it has no environment.json"),
        ("method: molf\nrun: {}\n", ["environment.json", "thesis.tex"], "it holds thesis.tex, "),
        ("method: molf\nrun: {}\n", ["environment.json", "a", "b"], "it holds a and 1 more, "),
    ],
)
def test_only_a_run_and_nothing_else_is_replaced(tmp_path, config, others, fault):
    path = tmp_path / "run"
    path.mkdir()
    if config is not None:
        (path / "config.yaml").write_text(config)
    for name in others:
        (path / name).touch()
    with pytest.raises(InputError) as error:
        check_output(path, overwrite=True)
    assert fault in str(error.value)


def test_exports_and_leavings_of_a_killed_process_belong_to_a_run(tmp_path):
    path = tmp_path / "run"
    write_run(path)
    (path / "error.log").touch()
    (path / ".model.123.tmp").mkdir()
    (path / "model-float16").mkdir()
    (path / "model-float16" / "molf_export.json").write_text('{"files": ["config.json"]}')
    (path / "model-float16" / "config.json").touch()
    check_output(path, overwrite=True)
    (path / "model-float16" / "notes.txt").touch()
    with pytest.raises(InputError, match="it holds model-float16"):
        check_output(path, overwrite=True)


@pytest.mark.parametrize("interrupted", [1, 2])
def test_interrupt_between_the_renames_loses_neither_directory(tmp_path, monkeypatch, interrupted):
    from pathlib import Path

    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    rename, calls = Path.rename, []

    def interrupting(self, target):
        calls.append(target)
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupting)

    def write():
        with replacing_directory(path) as temporary:
            (temporary / "new").touch()

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["model"]


KILLED = """
import os, signal, sys
from pathlib import Path
from molf.disk import files
path, when = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if when == "between the renames":
    Path.rename, rename = lambda self, to: (rename(self, to), die()), Path.rename
with getattr(files, sys.argv[3])(path) as temporary:
    if temporary.is_dir():
        (temporary / "new").touch()
    if when == "while writing":
        die()
"""


def killed(path, when, function="replacing_directory"):
    arguments = [sys.executable, "-c", KILLED, str(path), when, function]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL


@pytest.mark.parametrize("function", ["replacing_directory", "replacing_file"])
def test_the_next_removes_what_a_killed_process_left(tmp_path, function):
    path = tmp_path / "model"
    killed(path, "while writing", function)
    (left,) = names(tmp_path)
    assert left.startswith(".model.")
    (tmp_path / ".model.77.tmp").mkdir()  # of an earlier release, or of a process of that number
    (tmp_path / ".other.78.tmp").mkdir()  # another's
    with getattr(files, function)(path):
        pass
    assert names(tmp_path) == [".other.78.tmp", "model"]


def test_the_earlier_directory_of_a_killed_process_is_not_lost(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "old").touch()
    killed(path, "between the renames")
    assert not path.exists()
    clear_unfinished(tmp_path)
    assert names(tmp_path) == ["model"]
    assert names(path) == ["old"]


def test_what_is_being_written_is_left_alone(tmp_path):
    with (
        replacing_directory(tmp_path / "model") as one,
        replacing_directory(tmp_path / "model") as other,
        replacing_file(tmp_path / "a.txt") as file,
    ):
        clear_unfinished(tmp_path)
        assert one.is_dir()
        assert other.is_dir()
        assert file.is_file()
        assert one != other
    assert names(tmp_path) == ["a.txt", "model"]


def test_scratch_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with scratch_directory("steps") as directory:
        assert directory.stat().st_mode & 0o777 == 0o700
        killed("steps", "while writing", "scratch_directory")
        assert len(names(tmp_path)) == 2
        with scratch_directory("steps") as other:
            assert names(tmp_path) == sorted([directory.name, other.name])
    assert names(tmp_path) == []


def test_a_check_that_was_killed_leaves_no_trace(tmp_path):
    """It tries whether a directory can be made."""
    path = tmp_path / "run"
    write_run(path)
    killed(path / "written", "while writing", "making_directory")
    killed(tmp_path / "written", "while writing", "making_directory")
    check_output(path, overwrite=True)
    check_output(tmp_path / "other", overwrite=False)
    assert names(tmp_path) == ["run"]


def test_a_directory_with_leavings_alone_is_empty(tmp_path):
    (tmp_path / ".config.yaml.123.tmp").touch()
    with RunDirectory(tmp_path, overwrite=False) as directory:
        write_json(directory / "config.yaml", {})
    assert names(tmp_path) == ["config.yaml"]


def test_name_that_leaves_no_room_for_those_beside_it(tmp_path):
    with pytest.raises(InputError, match=r"201 bytes\. Must be at most 200"):
        check_output(tmp_path / ("x" * 201), overwrite=False)
    with pytest.raises(InputError, match=r"output_dir .*\.\.\. is not a path: File name too long"):
        check_output(tmp_path / ("x" * 300), overwrite=False)
