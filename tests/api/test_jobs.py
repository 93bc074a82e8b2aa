"""`molf.train` and its like, and `molf.Run`: the commands from Python."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import molf
from checkpoints import write_checkpoint, write_facts
from molf.cli import main
from molf.errors import InputError
from molf.shown import as_line

NOT_OF_LR = ("learning_rate", "logging_steps", "spectra")  # of a whole training alone


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    write_checkpoint(folder / "base")
    write_facts(folder / "facts.jsonl")
    return {
        "task": "fact",
        "model": folder / "base",
        "data": folder / "facts.jsonl",
        "ranks": [2, 4],
        "alpha": (4, 8.0),
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "spectra": False,
    }


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    return molf.train(**options, output_dir=tmp_path_factory.mktemp("runs") / "run")


def as_arguments(options):
    for name, value in options.items():
        if value is False:
            yield f"--no-{name}"
        else:
            given = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            yield from (f"--{name}", str(given))


def test_same_run_as_the_command(run, options, tmp_path, capsys):
    assert capsys.readouterr().out == ""
    path = tmp_path / "command"
    assert main(["train", *as_arguments(options), "--output_dir", str(path)]) == 0
    other = molf.Run(path)
    form = r"^record (\d+): (.*)\n  before .*\n  after  (.*)$"
    shown = re.findall(form, capsys.readouterr().out, re.M)
    assert [int(index) for index, _, _ in shown] == [0, 1, 2]
    assert shown[0][1] == other.predictions[0]["prompt"]
    assert shown[0][2] in as_line(other.predictions[0]["prediction"].strip())
    own = {"output_dir", "data", "model"}
    for name in run.options.keys() - own:
        assert run.options[name] == other.options[name], name
    assert run.routing.equals(other.routing)
    assert run.after == other.after
    assert run.predictions == other.predictions
    assert [line["loss"] for line in run.log if "loss" in line] == [
        line["loss"] for line in other.log if "loss" in line
    ]


def test_a_run_is_read(run, tmp_path):
    assert run.status == "complete"
    assert repr(run) == f"Run({str(run.path)!r}, method='molf', status='complete')"
    assert run.options["ranks"] == [2, 4]
    assert run.record["training"]["steps"] == 3
    assert run.before["es"].count == 12
    assert not math.isnan(run.after["es"].low)
    assert run.log[0]["step"] == 1
    assert len(run.predictions) == 12
    assert set(run.routing.column_names) == {"step", "layer", "expert", "score", "winner"}
    assert (run.path / "report.html").is_file()
    assert not (run.path / "spectra.json").exists()
    assert len(run.assignment.layers) == 14


def test_the_model_of_a_run(run):
    model, tokenizer = run.model(), run.tokenizer()
    ids = tokenizer("One two", return_tensors="pt").input_ids
    assert model(ids).logits.shape[-1] == model.config.vocab_size


def test_evaluate(run, options, tmp_path):
    found = molf.evaluate(
        run.path / "model", task="fact", data=options["data"], output_dir=tmp_path / "evaluation"
    )
    assert found["fact"].metrics["es"].value == run.after["es"].value
    assert (tmp_path / "evaluation/eval.json").is_file()
    assert (tmp_path / "evaluation/report.html").is_file()


def test_plan(options, capsys):
    common = {name: options[name] for name in ("task", "model", "ranks", "alpha")}
    machines = {"device": "cpu", "num_gpus": 4, "num_nodes": 2}
    found = molf.plan(**common, **machines, learning_rate=1.0, max_length=32)
    assert capsys.readouterr().out == ""
    given = as_arguments(common | machines | {"max_length": 32})
    assert main(["plan", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.record()))
    assert isinstance(found, molf.TrainingPlan)
    assert [device.gib for device in found.fits] == [24, 40, 80, 141]
    assert found.advice == {}
    assert found.traffic.gpus == 8


def test_plan_of_a_recipe():
    found = molf.plan("demo-fact-molf", ranks=[4], max_length=10)
    assert (found.workload.config.ranks, found.workload.length) == ((4,), 10)
    larger = replace(found.memory, weights=30 * 2**30)
    assert [device.gib for device in replace(found, memory=larger).fits] == [40, 80, 141]


def test_a_recipe_of_a_plan_has_the_machines(tmp_path):
    (tmp_path / "a.yaml").write_text("task: demo-fact\nnum_gpus: 2\nmethod: fft\n")
    found = molf.plan(tmp_path / "a.yaml", num_nodes=2)
    assert found.traffic.gpus == 4


def test_a_recipe_of_a_range_test_has_the_range(tmp_path):
    (tmp_path / "a.yaml").write_text("from: 0.5\nto: 0.6\n")
    with pytest.raises(InputError, match=r"Invalid from=0\.5 with to=0\.6"):
        molf.find_rates(tmp_path / "a.yaml")
    with pytest.raises(InputError, match=r"Invalid from=0\.1 with to=0\.6"):
        molf.find_rates(tmp_path / "a.yaml", from_=0.1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, '"cuda", "cpu"'),
        ({"num_gpus": 0}, "Invalid num_gpus=0. Must be at least 1"),
        ({"num_nodes": 1.5}, "whole number"),
        ({"method": "dora"}, "can be planned"),
        ({"json": True}, "TrainingPlan.record"),
        ({"metod": "fft"}, "metod"),
    ],
)
def test_wrong_plans(options, words):
    with pytest.raises(InputError) as caught:
        molf.plan(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rates(options, tmp_path, capsys):
    common = {name: one for name, one in options.items() if name not in NOT_OF_LR}
    common |= {"method": "fft", "max_steps": 20}
    found = molf.find_rates(**common, from_=1e-4, to=None, output_dir=tmp_path / "rates")
    assert capsys.readouterr().out == ""
    command = ["lr", *as_arguments(common), "--from", "1e-4"]
    assert main([*command, "--output_dir", str(tmp_path / "command")]) == 0
    files = [(path / "rates.csv").read_text() for path in (found.path, tmp_path / "command")]
    assert files[0] == files[1]
    record = json.loads((tmp_path / "command/rates.json").read_text())
    ((sweep, recorded),) = zip(found.sweeps, record["sweeps"], strict=True)
    assert isinstance(found, molf.RangeTest)
    assert found.suggestions == {"learning_rate": recorded["suggestion"]}
    assert sweep.rates.tolist() == recorded["rates"]
    assert sweep.losses.shape == sweep.rates.shape == sweep.evidence.smoothed.shape
    assert sweep.doubts == recorded["doubts"]


def test_probe(options, tmp_path, capsys):
    common = {name: one for name, one in options.items() if name not in NOT_OF_LR}
    found = molf.probe(**common, share=0.5, output_dir=tmp_path / "probe")
    assert capsys.readouterr().out == ""
    command = ["probe", *as_arguments(common), "--share", "0.5", "--no-plan"]
    assert main([*command, "--output_dir", str(tmp_path / "command")]) == 0
    other = molf.Run(tmp_path / "command")
    assert (found.status, found.record["probe"], found.after) == ("complete", True, {})
    assert found.routing.equals(other.routing)
    assert found.assignment.entries == other.assignment.entries
    full = found.assignment.full
    assert (len(full), len(found.assignment.entries)) == (7, 14)


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("find_rates", {"from_": -1}, "Invalid from=-1"),
        ("find_rates", {"to": "high"}, "to"),
        ("find_rates", {"max_steps": 3}, "at least 20"),
        ("find_rates", {"by": "wins"}, "by"),
        ("probe", {"method": "fft"}, "Invalid method=fft: a probe"),
        ("probe", {"share": 2.0}, "Invalid share=2"),
        ("probe", {"plan": False}, "for the command line"),
    ],
)
def test_wrong_short_trainings(function, options, words, tmp_path):
    with pytest.raises(InputError) as caught:
        getattr(molf, function)(output_dir=tmp_path / "out", **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_complete_run_is_resumed_at_no_cost(run, options):
    again = molf.train(**options, output_dir=run.path, resume=True)
    assert again.path == run.path


def test_a_recipe_and_options_that_replace_it(options, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: fft\nmax_steps: 100\nlearning_rate: 1e-3\n")
    given = {name: options[name] for name in ("task", "model", "data")}
    run = molf.train(recipe, **given, max_steps=1, ranks=None, output_dir=tmp_path / "run")
    assert (run.options["method"], run.options["max_steps"]) == ("fft", 1)
    with pytest.raises(InputError, match="has no routing"):
        _ = run.routing


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metod": "fft"}, "metod"),
        ({"max_steps": 1.5}, "whole number"),
        ({"max_steps": "many"}, "max_steps"),
        ({"method": "magic"}, "molf-e"),
        ({"ranks": [0]}, "ranks"),
        ({"dry_run": True}, "for the command line"),
        ({"config": "demo-fact-molf"}, "recipe as first argument"),
    ],
)
def test_wrong_options(options, words, tmp_path):
    with pytest.raises(InputError) as caught:
        molf.train(output_dir=tmp_path / "run", **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " from options" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wrong_calls(run, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        molf.train("no-recipe")
    with pytest.raises(InputError, match="Give task"):
        molf.evaluate(run.path / "model")
    with pytest.raises(InputError, match="one of the two"):
        molf.evaluate(task="fact")
    with pytest.raises(InputError, match="not a run"):
        molf.Run(tmp_path)


def test_a_run_that_has_not_ended(run, tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text((run.path / "config.yaml").read_text())
    found = molf.Run(path)
    assert found.status == "stopped"
    assert (found.before, found.after, found.log, found.predictions) == ({}, {}, [], [])
    with pytest.raises(InputError, match="has no model/"):
        found.model()
    (Path(path) / "metrics.jsonl").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        _ = molf.Run(path).log


def test_of_several_processes_the_first_writes_the_page(monkeypatch, tmp_path):
    result = SimpleNamespace(directory=tmp_path, training_seconds=1.0)
    written = []
    monkeypatch.setattr("molf.job.run.train", lambda settings: result)
    monkeypatch.setattr("molf.job.extract.spectra.spectra_at_end", lambda *_: written.append(1))
    monkeypatch.setattr("molf.report.build.page_at_end", written.append)
    monkeypatch.setattr("molf.api.jobs.Run", lambda path: path)
    for rank, files in (("1", 0), ("0", 2)):
        for name, value in (("LOCAL_RANK", rank), ("RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert molf.train(task="demo-fact") == tmp_path
        assert len(written) == files
