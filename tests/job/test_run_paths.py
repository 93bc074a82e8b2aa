"""A path that is close to the right one: the message names the one that was meant."""

import json
import shutil

import pytest

from molf.cli import main


@pytest.fixture
def run(tmp_path):
    """A run's directory, without weights: nothing here is loaded."""
    path = tmp_path / "run"
    for part in ("model", "adapter", "routing", "checkpoints/checkpoint-3", "model-bfloat16"):
        (path / part).mkdir(parents=True)
    (path / "config.yaml").write_text("method: molf-e\nrun:\n  task: {}\n")
    (path / "environment.json").write_text("{}")
    for part in ("model", "model-bfloat16", "checkpoints/checkpoint-3"):
        (path / part / "config.json").write_text("{}")
    (path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/base"})
    )
    return path


@pytest.fixture
def refused(capsys):
    def check(*arguments):
        assert main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return check


def commands(model):
    return [
        ("eval", model, "--task", "fact", "--data", "facts.jsonl"),
        ("train", "--model", model, "--task", "fact", "--data", "facts.jsonl"),
        ("train", "--model", model, "--task", "fact", "--data", "facts.jsonl", "--dry_run"),
        ("plan", "--model", model),
        ("data", "--model", model, "--task", "fact", "--data", "facts.jsonl"),
    ]


@pytest.mark.parametrize("command", range(5))
@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("", ["is a run of molf train", "Give its model: {run}/model."]),
        ("adapter", ["is a PEFT adapter", "is {run}/model: give that"]),
        ("routing", ["is a part of the run {run}", "Give its model: {run}/model."]),
        ("checkpoints", ["is a part of the run {run}", "Give its model: {run}/model."]),
        ("..", ["holds runs of molf train", "{run}/model"]),
    ],
)
def test_model_that_was_meant(run, refused, command, part, words):
    given = run.parent if part == ".." else run / part
    error = refused(*commands(given)[command])
    for word in (f"model {given} ", *words):
        assert word.format(run=run) in error


@pytest.mark.parametrize("command", range(5))
def test_missing_part_of_a_run_is_no_hub_id(run, refused, monkeypatch, command):
    monkeypatch.chdir(run.parent)
    shutil.rmtree(run / "adapter")
    error = refused(*commands("run/adapter")[command])
    assert "run/adapter does not exist in the run" in error
    assert "run/model.\n" in error


def test_hub_id_within_a_run(run, refused, monkeypatch):
    monkeypatch.chdir(run)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "some/base is no local directory, and " in refused("plan", "--model", "some/base")


def test_link_to_a_run(run, refused, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(run)
    assert f"Give its model: {link}/model." in refused(*commands(link)[0])


def test_relative_path_is_answered_by_one(run, refused, monkeypatch):
    monkeypatch.chdir(run.parent)
    assert "Give its model: run/model." in refused(*commands("run")[3])
    assert "is run/model: give that" in refused(*commands("run/adapter")[3])
    monkeypatch.chdir(run)
    assert "Give its model: model." in refused(*commands(".")[3])
    assert "Give ." in refused("export", "model")


def test_unfinished_run(run, refused):
    shutil.rmtree(run / "model")
    error = refused(*commands(run)[3])
    assert "It has no model/: the run has not ended, or failed" in error
    assert f"Its adapter is {run}/adapter. Load it onto its base, some/base," in error
    shutil.rmtree(run / "adapter")
    assert f"Its latest checkpoint is {run}/checkpoints/checkpoint-3." in refused(*commands(run)[3])
    shutil.rmtree(run / "checkpoints")
    assert refused(*commands(run)[3]).endswith("failed before saving its model.\n")


def test_adapter_of_no_run(run, refused, tmp_path):
    adapter = tmp_path / "mine"
    (run / "adapter").rename(adapter)
    shutil.rmtree(run)
    error = refused(*commands(adapter)[0])
    assert f"model {adapter} is a PEFT adapter, not a whole model. Load it onto its base," in error
    assert "merge_and_unload()" in error
    # with a configuration beside it, as some trainers write, it is no whole model either
    (adapter / "config.json").write_text("{}")
    assert "is a PEFT adapter" in refused(*commands(adapter)[0])
    (adapter / "adapter_config.json").write_text("[")
    assert "Load it with peft" in refused(*commands(adapter)[0])


def test_directory_of_models(run, refused, tmp_path):
    (run / "config.yaml").unlink()
    error = refused(*commands(run)[3])
    assert f"It holds {run}/model, {run}/model-bfloat16: give a model." in error


@pytest.mark.parametrize("command", ["export", "routing"])
@pytest.mark.parametrize(
    "part",
    ["model", "adapter", "routing", "checkpoints/checkpoint-3", "model-bfloat16"],
)
def test_run_that_was_meant(run, refused, command, part):
    assert f"{run / part} is a part of the run {run}. Give {run}.\n" in refused(command, run / part)


@pytest.mark.parametrize("command", ["export", "routing"])
def test_file_of_a_run_and_directory_of_runs(run, refused, command, tmp_path):
    assert f"is a file of the run {run}. Give {run}." in refused(command, run / "config.yaml")
    assert f"it holds {run}. Give one run." in refused(command, tmp_path)


def test_predictions_of_a_run(run, refused):
    (run / "predictions.jsonl").touch()
    error = refused("eval", "--task", "fact", "--data", "x.jsonl", "--predictions", run)
    assert f"Give its file: {run}/predictions.jsonl." in error


def test_run_inside_of_another_is_a_run(run, refused):
    inner = run / "checkpoints" / "run"
    shutil.copytree(run / "model", inner / "model")
    shutil.copy(run / "config.yaml", inner)
    assert f"Give its model: {inner}/model." in refused(*commands(inner)[3])


def test_routing_says_what_it_came_to(molf_run, capsys):
    assert main(["routing", str(molf_run.path)]) == 0
    import yaml

    config = yaml.safe_load((molf_run.path / "config.yaml").read_text())
    meaning = config["run"]["routing"]["meaning"]
    assert meaning
    assert capsys.readouterr().out.splitlines()[-1] == meaning
