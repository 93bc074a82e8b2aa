"""A run that goes on is nobody else's to replace, and writes into no directory but its own."""

import json
import shutil
import threading

import pytest
import yaml

from molf.cli import main
from molf.core.optimizer import MoLFAdamW
from molf.disk.locks import Lock, in_use
from molf.errors import InputError
from molf.job.record.directory import RunDirectory, check_output
from molf.job.record.ownership import AN_EVALUATION
from molf.job.record.routing_log import read_routing


@pytest.fixture
def at_step(monkeypatch):
    """Have something done in the run's second step."""

    def do(act):
        step, calls = MoLFAdamW.step, []

        def stepping(self, closure=None):
            calls.append(self)
            if len(calls) == 2:
                act()
            return step(self, closure)

        monkeypatch.setattr(MoLFAdamW, "step", stepping)

    return do


def steps_in(path):
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def is_whole(path):
    names = {entry.name for entry in path.iterdir()}
    return {"config.yaml", "environment.json", "eval.json", "predictions.jsonl"} <= names and (
        path / "model" / "model.safetensors"
    ).is_file()


def test_a_second_run_is_refused_and_the_first_goes_on(options, at_step, tmp_path, capsys):
    path = tmp_path / "out"
    codes = []

    def others():
        codes.append(main([*options, "--output_dir", str(path)]))
        codes.append(main([*options, "--overwrite", "--output_dir", str(path)]))
        codes.append(main([*options, "--output_dir", str(path / "checkpoints" / "inner")]))
        codes.append(main(["export", str(path)]))

    at_step(others)
    assert main([*options, "--output_dir", str(path)]) == 0
    assert codes == [2, 2, 2, 2]
    error = capsys.readouterr().err
    assert error.count(f"molf: error: output_dir {path} is in use") == 2
    assert f"lies in {path}, where a run of molf train has not ended" in error
    assert f"{path} is in use: its run has not ended" in error
    assert is_whole(path)
    assert steps_in(path) == [1, 2, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".results.csv.lock",
        "out",
        "results.csv",
    ]
    assert not in_use(path)
    check_output(path, overwrite=True)


def test_an_evaluation_does_not_write_into_a_run_that_goes_on(tmp_path, capsys):
    with RunDirectory(tmp_path / "out", overwrite=False) as directory:
        texts = tmp_path / "texts.jsonl"
        texts.write_text('{"index": 0, "prediction": "x"}\n')
        arguments = ["eval", "--task", "demo-sql", "--predictions", str(texts)]
        assert main([*arguments, "--output_dir", str(directory.path)]) == 2
    assert "is in use" in capsys.readouterr().err


def test_runs_that_begin_together_share_no_directory(tmp_path):
    path = tmp_path / "a" / "out"
    began, refused = [], []
    barrier = threading.Barrier(6)

    def begin():
        barrier.wait()
        try:
            began.append(RunDirectory(path, overwrite=True))
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(began) == 1
    assert len(refused) == 5
    assert all("in use" in message for message in refused)
    assert [p.name for p in path.parent.iterdir()] == ["out"]
    began[0].release()


def test_a_run_that_is_read_is_not_replaced(molf_run):
    with Lock(molf_run.path, shared=True), pytest.raises(InputError, match="in use"):
        check_output(molf_run.path, overwrite=True)
    check_output(molf_run.path, overwrite=True)


def a_finished_run(path):
    for part in ("model", "routing"):
        (path / part).mkdir(parents=True)
    (path / "config.yaml").write_text("method: molf\nrun: {}\n")
    (path / "environment.json").write_text("{}")
    return path


@pytest.mark.parametrize("place", ["model/inner", "routing/a/b", "checkpoints/inner", "adapter"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_run_goes_into_what_another_one_would_delete(tmp_path, place, overwrite):
    run = a_finished_run(tmp_path / "out")
    (tmp_path / "link").symlink_to(run)
    for around in (run, tmp_path / "link"):
        with pytest.raises(InputError, match="lies in a part of"):
            check_output(around / place, overwrite=overwrite)
        with pytest.raises(InputError, match="lies in a part of"):
            check_output(around / place, overwrite=overwrite, ownership=AN_EVALUATION)
    check_output(tmp_path / "model", overwrite=overwrite)
    check_output(run / "inner", overwrite=overwrite)


def test_a_moved_run_goes_on_where_it_is(options, at_step, tmp_path, capsys):
    path, moved = tmp_path / "out", tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()

    def move():
        path.rename(moved)
        path.mkdir()
        (path / "notes.txt").write_text("another's")

    at_step(move)
    assert main([*options, "--save_steps", "1", "--output_dir", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(f"output_dir {path} was moved during its run") == 1
    assert f"writes to {moved} from now on" in captured.err
    assert f"run      {moved}" in captured.out
    assert [p.name for p in path.iterdir()] == ["notes.txt"]
    assert is_whole(moved)
    assert steps_in(moved) == [1, 2, 3]
    assert set(read_routing(moved)["step"].to_pylist()) == {0, 1, 2}
    saved = sorted(p.name for p in (moved / "checkpoints").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_run_whose_model_is_trained_on_is_not_replaced(molf_run, options, tmp_path, at_step):
    given = [*options]
    given[given.index("--model") + 1] = str(molf_run.path / "model")
    codes = []
    replacing = [*options, "--overwrite", "--output_dir", str(molf_run.path)]
    at_step(lambda: codes.append(main(replacing)))
    assert main([*given, "--output_dir", str(tmp_path / "second")]) == 0
    assert codes == [2]
    check_output(molf_run.path, overwrite=True)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_run_that_is_deleted_while_it_is_measured(
    options, monkeypatch, tmp_path, capsys, evaluation
):
    """Before the training the trainer would make the directory anew, after it weights are gone."""
    from molf.job import evaluating

    path, evaluate, calls = tmp_path / "out", evaluating.evaluate, []

    def deleting(*given, **named):
        calls.append(given)
        if len(calls) == evaluation:
            shutil.rmtree(path)
        return evaluate(*given, **named)

    monkeypatch.setattr(evaluating, "evaluate", deleting)
    assert main([*options, "--output_dir", str(path)]) == 0
    assert not path.exists()
    place = path.with_name("out.recovered-1")
    assert f"writes to {place} from now on" in capsys.readouterr().err
    assert is_whole(place)
    assert main(["eval", str(place / "model"), *options[1:3], *options[5:7]]) == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_a_deleted_run_keeps_its_weights(options, at_step, tmp_path, capsys, replaced):
    path = tmp_path / "runs" / "out"

    def delete():
        shutil.rmtree(path.parent)
        if replaced:
            path.mkdir(parents=True)
            (path / "notes.txt").write_text("another's")

    at_step(delete)
    assert main([*options, "--save_steps", "2", "--output_dir", str(path)]) == 0
    captured = capsys.readouterr()
    place = path.with_name("out.recovered-1")
    assert captured.err.count(f"output_dir {path} was deleted or replaced") == 1
    assert f"writes to {place} from now on" in captured.err
    if replaced:
        assert [p.name for p in path.iterdir()] == ["notes.txt"]
    else:
        assert not path.exists()
    assert is_whole(place)
    assert steps_in(place) == [2, 3]
    assert yaml.safe_load((place / "config.yaml").read_text())["run"]["saved"]
    assert main(["export", str(place), "--dtype", "bfloat16"]) == 0


def test_a_run_whose_place_cannot_be_written_any_more(tmp_path):
    """A file stands where its folder was: the weights go to the place for temporary files."""
    path = tmp_path / "runs" / "out"
    with RunDirectory(path, overwrite=False) as directory:
        shutil.rmtree(path.parent)
        path.parent.write_text("a file")
        with pytest.warns(UserWarning, match="was deleted or replaced"):
            place = directory / "config.yaml"
        assert place.parent.is_dir()
        assert tmp_path not in place.parents
        shutil.rmtree(place.parent)


def test_a_run_that_lost_its_place_deletes_nothing_of_others(tmp_path):
    path = tmp_path / "out"
    with RunDirectory(path, overwrite=False) as directory:
        path.rename(tmp_path / "mine")
        path.mkdir()
        (path / "notes.txt").touch()
        directory.discard()
    assert (path / "notes.txt").is_file()


def test_the_earlier_run_is_locked_while_it_is_aside(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "config.yaml").write_text("method: molf\nrun: {}\n")
    (path / "environment.json").touch()
    directory = RunDirectory(path, overwrite=True)
    assert in_use(directory.replaced)
    directory.replaced.rename(tmp_path / "saved")
    directory.replaced.mkdir()
    (directory.replaced / "notes.txt").touch()
    directory.complete()
    directory.release()
    assert (tmp_path / "out.replaced-1" / "notes.txt").is_file()
    assert (tmp_path / "saved" / "config.yaml").is_file()


def test_an_earlier_run_that_cannot_be_deleted_fails_nothing(monkeypatch, tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "config.yaml").write_text("method: molf\nrun: {}\n")
    (path / "environment.json").touch()

    def refuse(path):
        raise PermissionError(1, "Operation not permitted")

    with RunDirectory(path, overwrite=True) as directory:
        monkeypatch.setattr(shutil, "rmtree", refuse)
        with pytest.warns(UserWarning, match=r"not deleted from .*out\.replaced-1"):
            directory.complete()
