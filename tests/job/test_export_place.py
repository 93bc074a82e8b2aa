"""Where an export may go: answered before torch is imported, and before anything is loaded."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from molf.cli import main


@pytest.fixture
def run(tmp_path):
    """A run's directory with weights that are never loaded: 4 MB in float32."""
    path = tmp_path / "runs" / "run"
    for part in ("model", "adapter"):
        (path / part).mkdir(parents=True)
    (path / "config.yaml").write_text("method: molf-e\nrun:\n  task: {}\n")
    (path / "environment.json").write_text("{}")
    (path / "model" / "config.json").write_text(json.dumps({"dtype": "float32"}))
    (path / "adapter" / "adapter_config.json").write_text("{}")
    tensors = {"weight": np.zeros((1000, 1000), np.float32), "ids": np.zeros(10, np.int64)}
    save_file(tensors, path / "model" / "model.safetensors")
    save_file(tensors, path / "adapter" / "adapter_model.safetensors")
    return path


@pytest.fixture
def refused(run, capsys, monkeypatch):
    """The one line by which an export is refused; what is there stays as it is."""

    def never(*given, **options):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("molf.job.libraries.quiet_libraries", never)

    def check(*arguments):
        before = sorted(run.parent.rglob("*"))
        assert main(["export", str(run), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert sorted(run.parent.rglob("*")) == before
        return error

    return check


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=str)
class TestNeverReplaced:
    def test_root(self, refused, overwrite):
        assert "output_dir / holds the run" in refused("--output_dir", "/", *overwrite)

    def test_other_mounted_disk(self, refused, overwrite):
        error = refused("--output_dir", "/proc", *overwrite)
        assert "output_dir /proc is where a disk is mounted" in error
        assert "such as /proc/model-float32" in error

    @pytest.mark.parametrize("place", ["", "model", "adapter", "model/sub", "routing/x"])
    def test_run_itself(self, refused, run, overwrite, place):
        assert "is the run's own" in refused("--output_dir", run / place, *overwrite)

    @pytest.mark.parametrize("levels", [1, 2])
    def test_directory_above_the_run(self, refused, run, overwrite, levels):
        place = run.parents[levels - 1]
        assert f"output_dir {place} holds the run" in refused("--output_dir", place, *overwrite)

    @pytest.mark.parametrize("given", [".", "..", "./", "sub/.."])
    def test_current_directory_even_if_empty(
        self, refused, overwrite, given, tmp_path, monkeypatch
    ):
        (tmp_path / "other" / "empty").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "other" / "empty")
        error = refused("--output_dir", given, *overwrite)
        assert "the current directory, which an export would replace" in error
        assert (tmp_path / "other" / "empty").is_dir()

    @pytest.mark.parametrize("given", ["~", "~/.."])
    def test_home(self, refused, overwrite, given, tmp_path, monkeypatch):
        (tmp_path / "homes" / "me").mkdir(parents=True)
        monkeypatch.setenv("HOME", str(tmp_path / "homes" / "me"))
        error = refused("--output_dir", given, *overwrite)
        assert "your home directory, which an export would replace" in error

    def test_link_to_such_a_place(self, refused, overwrite, run, tmp_path):
        (tmp_path / "link").symlink_to(run.parent)
        assert "holds the run" in refused("--output_dir", tmp_path / "link", *overwrite)

    def test_directory_of_something_else(self, refused, overwrite, tmp_path):
        (tmp_path / "thesis").mkdir()
        (tmp_path / "thesis" / "thesis.tex").touch()
        error = refused("--output_dir", tmp_path / "thesis", *overwrite)
        assert "is not an export of molf export alone (it has no molf_export.json)" in error
        assert ("--overwrite would not" if not overwrite else "--overwrite does not") in error

    def test_file(self, refused, overwrite, tmp_path):
        (tmp_path / "file").touch()
        assert "is a file" in refused("--output_dir", tmp_path / "file", *overwrite)

    def test_read_only_disk(self, refused, overwrite):
        error = refused("--output_dir", "/proc/sys/model", *overwrite)
        assert "output_dir /proc/sys/model cannot be written" in error


def test_torch_is_not_imported(run):
    code = (
        "import sys; from molf.cli import main;"
        f"assert main(['export', {str(run)!r}, '--output_dir', '/']) == 2;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.fixture
def free(monkeypatch):
    def set_free(size, total=10**12):
        usage = SimpleNamespace(free=size, total=total)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return set_free


@pytest.mark.parametrize("what", ["model", "adapter"])
def test_room_is_checked_first(refused, run, free, tmp_path, what):
    free(1_500_000)
    error = refused("--what", what, "--dtype", "bfloat16", "--output_dir", tmp_path / "new")
    assert f"output_dir {tmp_path / 'new'}: the export needs about 2.0 MB there" in error
    assert f"(the {what} in bfloat16 2.0 MB), and 1.5 MB are free." in error
    free(3_000_000)
    assert "needs about 4.0 MB" in refused("--what", what)  # beside the run, in its own type


def test_disk_that_does_not_count_is_not_full(run, free):
    from molf.job.model.export_place import export_place
    from molf.job.record.finished_run import read_run

    free(0, total=0)
    found = export_place(read_run(run), "model", None, None, overwrite=False)
    assert found == run / "model-float32"


def test_damaged_weights(refused, run):
    (run / "model" / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors cannot be read as safetensors" in refused()
    (run / "model" / "model.safetensors").unlink()
    assert "has no weights" in refused()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
@pytest.mark.parametrize("name", ["model.safetensors", "more.safetensors", "tokenizer.json"])
def test_pipe_among_the_weights(refused, run, name):
    (run / "model" / name).unlink(missing_ok=True)
    os.mkfifo(run / "model" / name)
    assert f"model {run / 'model'}: {name} is a pipe (FIFO)" in refused()
    os.mkfifo(run / "adapter" / "more.safetensors")
    assert "more.safetensors is a pipe (FIFO)" in refused("--what", "adapter")
