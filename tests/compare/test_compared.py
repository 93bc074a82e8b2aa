"""Groups of runs, refusals, marks and margins."""

import csv
import json
from importlib.metadata import version

import pytest
import yaml

from compared_runs import write_compared, write_six
from molf.compare.cells import cells_of
from molf.compare.pareto import check_pareto, pareto_figure
from molf.compare.runs import read_compared
from molf.compare.summary import BEST, CLOSE, UNKNOWN, WORSE, summarise
from molf.disk.locks import Lock
from molf.errors import InputError
from molf.measure.meanings import METRICS_VERSION


def summary_of(paths):
    runs, notices = read_compared(paths)
    cells, more = cells_of(runs)
    return summarise(cells), [*notices, *more]


def places(metric):
    return {name: one.place for name, one in metric.methods.items()}


def test_means_marks_and_margin(tmp_path):
    (found,), notices = summary_of(write_six(tmp_path))
    assert notices == []
    assert (found.cell.task, found.cell.model) == ("demo-med", "tiny")
    names = [one.name for one in found.metrics]
    assert names[:3] == ["accuracy", "forgetting_loss", "forgetting"]
    assert names[3:] == ["trained_parameters", "training_seconds", "peak_memory_bytes"]
    accuracy = found.metric("accuracy")
    assert accuracy.methods["molf"].value.value == 15 / 16
    assert accuracy.methods["molf"].value.units == "questions and seeds"
    assert places(accuracy)["molf"] == BEST
    assert accuracy.methods["fft"].behind.value == pytest.approx(10 / 16 - 15 / 16)
    assert accuracy.margins["molf"].value == pytest.approx(5 / 16)  # fft is the better one
    forgetting = found.metric("forgetting")
    assert forgetting.minimize
    assert places(forgetting) == {"fft": WORSE, "lora": BEST, "molf": WORSE}
    assert forgetting.margins["molf"].value == pytest.approx(0.1)  # lora forgets least
    assert forgetting.methods["lora"].value.value == pytest.approx(0.0515)
    memory = found.metric("peak_memory_bytes")
    assert places(memory)["lora"] == CLOSE  # equal
    assert memory.margins == {}


def test_costs_that_are_recorded_nowhere_are_absent(tmp_path):
    """Earlier releases wrote time and memory into the table of runs alone."""
    paths = write_six(tmp_path)
    for path in paths:
        config = yaml.safe_load((path / "config.yaml").read_text())
        del config["run"]["training"]
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    (found,), _ = summary_of(paths)
    assert found.metric("trained_parameters") is not None
    assert found.metric("training_seconds") is found.metric("peak_memory_bytes") is None


def test_one_seed_has_intervals_of_questions(tmp_path):
    paths = write_six(tmp_path)
    (found,), _ = summary_of([paths[0], paths[4]])
    assert found.metric("accuracy").methods["molf"].value.units == "questions"
    assert places(found.metric("forgetting")) == {"fft": UNKNOWN, "molf": BEST}
    assert found.metric("accuracy").margins == {}  # no run of lora


def test_other_weights_of_the_data_are_other_columns(tmp_path):
    """The same files and seed: neither run is a newer one of the other."""
    paths = []
    for name, data in (("plain", "/a.jsonl,/b.jsonl"), ("heavy", "/a.jsonl:2,/b.jsonl")):
        paths.append(write_compared(tmp_path / name, "molf", 1))
        config = yaml.safe_load((paths[-1] / "config.yaml").read_text())
        (paths[-1] / "config.yaml").write_text(yaml.safe_dump({**config, "data": data}))
    (found,), notices = summary_of(paths)
    assert [*found.cell.methods] == ["molf (weights=1)", "molf (weights=2,1)"]
    assert any(": weights differs:" in line for line in notices)
    assert not any("is left out" in line for line in notices)


def test_other_settings_are_other_columns(tmp_path):
    paths = [
        write_compared(tmp_path / f"{score}-{seed}", "molf", seed, score=score)
        for score in ("epd", "gsnr")
        for seed in (1, 2)
    ]
    (found,), _ = summary_of(paths)
    assert [*found.cell.methods] == ["molf (score=epd)", "molf (score=gsnr)"]
    assert [*found.cell.methods["molf (score=gsnr)"]] == [1, 2]


def test_newer_of_two_equal_runs_counts(tmp_path):
    old = write_compared(tmp_path / "old", "fft", 1, right=(0, 0))
    new = write_compared(tmp_path / "new", "fft", 1, right=(1, 1))
    other = write_compared(tmp_path / "other", "lora", 1, right=(1, 0))
    environment = json.loads((new / "environment.json").read_text())
    environment["started"] = "2026-11-02T10:00:00+00:00"
    (new / "environment.json").write_text(json.dumps(environment))
    (found,), notices = summary_of([new, old, other])
    assert found.metric("accuracy").methods["fft"].value.value == 1
    assert notices[0].startswith(f"{old} is left out: {new} has its method, settings and seed")


def test_unequal_training_is_noted(tmp_path):
    one = write_compared(tmp_path / "one", "fft", 1)
    other = write_compared(tmp_path / "other", "lora", 2, num_train_epochs=3.0)
    config = yaml.safe_load((one / "config.yaml").read_text())
    (one / "config.yaml").write_text(yaml.safe_dump({**config, "num_train_epochs": 2.0}))
    environment = json.loads((other / "environment.json").read_text())
    environment["packages"]["molf"] = "0.0.9"
    environment["device"]["name"] = "H200"
    (other / "environment.json").write_text(json.dumps(environment))
    (found,), notices = summary_of([one, other])
    assert notices[2:] == [
        "demo-med, tiny: time and memory were measured on several machines or in several ways: "
        "x86_64 (unknown memory); H200 (unknown memory).",
        f"demo-med, tiny: runs of molf {version('molf')}, 0.0.9; their metrics have one version.",
    ]
    assert notices[:2] == [
        "demo-med, tiny: num_train_epochs differs: fft 2; lora 3.",
        "demo-med, tiny: seeds differ: fft 1; lora 2. Differences are over common seeds alone.",
    ]
    assert places(found.metric("accuracy")) == {"fft": BEST, "lora": UNKNOWN}
    assert found.metric("accuracy").methods["lora"].behind is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"data": "bb"}, "the hash of the data is {} in the first and {} in the second."),
        ({"contents": "sha256:b2"}, "the hash of the base /models/tiny is sha256:b1 in the"),
        ({"right": (1, 0)}, "the number of evaluated records is 4 in the first and 2 in the"),
        ({"max_eval_samples": 2}, None),  # the other run has no such option
    ],
)
def test_not_comparable(tmp_path, change, text):
    paths = [
        write_compared(tmp_path / "one", "fft", 1),
        write_compared(tmp_path / "other", "lora", 1, **change),
    ]
    if text is None:
        assert len(summary_of(paths)[0]) == 1
        return
    with pytest.raises(InputError) as error:
        summary_of(paths)
    message = str(error.value)
    assert message.startswith(f"{paths[0]} and {paths[1]} are not comparable: ")
    assert text.split(" {}")[0] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("eval.json", "metrics_version", METRICS_VERSION + 1),  # of a newer molf
        ("config.yaml", "eval_part", "validation"),
        ("config.yaml", "run.task.prompt_version", 2),
    ],
)
def test_other_versions_and_parts(tmp_path, file, name, value):
    paths = [write_compared(tmp_path / x, "fft", i) for i, x in enumerate(("one", "other"))]
    content = yaml.safe_load((paths[1] / file).read_text())
    *outer, last = name.split(".")
    place = content
    for part in outer:
        place = place[part]
    place[last] = value
    write = json.dumps if file == "eval.json" else yaml.safe_dump
    (paths[1] / file).write_text(write(content))
    with pytest.raises(InputError, match=rf"is (1|test) in the first and {value} in the second"):
        summary_of(paths)


@pytest.mark.parametrize(("metric", "comparable"), [("accuracy", True), ("valid_sql", False)])
def test_only_versions_that_changed_a_metric_count(tmp_path, metric, comparable):
    paths = [write_compared(tmp_path / x, "fft", i) for i, x in enumerate(("one", "other"))]
    for number, path in enumerate(paths, 1):
        recorded = json.loads((path / "eval.json").read_text()) | {"metrics_version": number}
        for when in ("before", "after"):
            recorded[when][metric] = recorded[when].pop("accuracy")
        (path / "eval.json").write_text(json.dumps(recorded))
    if comparable:
        assert len(summary_of(paths)[0]) == 1
        return
    with pytest.raises(InputError, match="version of the metrics is 1 in the first and 2 in the"):
        summary_of(paths)


def test_models_are_known_by_their_contents(tmp_path):
    same = write_compared(tmp_path / "moved", "lora", 1, model="/elsewhere/tiny")
    other = write_compared(tmp_path / "b", "lora", 2, model="/b/tiny", contents="sha256:b2")
    found, _ = summary_of([write_compared(tmp_path / "one", "fft", 1), same, other])
    assert [one.cell.name for one in found] == ["demo-med, /models/tiny", "demo-med, /b/tiny"]
    assert [*found[0].cell.methods] == ["fft", "lora"]


def refused(paths):
    with pytest.raises(InputError) as error:
        read_compared(paths)
    return str(error.value)


def test_incomplete_runs(tmp_path):
    one, other = (write_compared(tmp_path / x, "fft", i) for i, x in enumerate(("one", "other")))
    with Lock(other):
        # Its evaluation is written before its end.
        (other / "checkpoints").mkdir()
        (other / "checkpoints" / "stages.json").write_text("{}")
        assert f"{other} is still being written" in refused([one, other])
    assert f"molf train --output_dir {other} --resume continues it" in refused([one, other])
    (other / "error.log").write_text("no")
    assert f"its run has failed ({other / 'error.log'})" in refused([one, other])


def test_no_runs(tmp_path):
    one = write_compared(tmp_path / "runs" / "one", "fft", 1)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "eval.json").write_text('{"task": "demo-med", "metrics": {}}')
    assert "is an evaluation of molf eval" in refused([one, evaluation])
    assert "is not a run of `molf train`" in refused([one, tmp_path])
    assert "is not a directory" in refused([one, tmp_path / "none"])
    assert f"{one} is given twice" in refused([one, one])
    assert "at least 2 runs; given: 1" in refused([one])
    (one.parent / "results.csv").write_text("run\n")
    assert f"Give its table: {one.parent / 'results.csv'}" in refused([one, one.parent])
    (one / "eval.json").write_text('{"before": 1}')
    assert "eval.json cannot be read" in refused([one])


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(run, method, seed, **more):
    return {
        "run": run,
        "started": "2026-11-01T10:00:00+00:00",
        "task": "demo-med",
        "method": method,
        "model": "/models/tiny",
        "seed": seed,
        "eval_part": "test",
        "training_loss": 0.5,
        "peak_memory_bytes": 2**20,
        "training_seconds": 3,
        "before/accuracy": 0.25,
        "after/accuracy": 0.5,
        "data_hash": "",
        **more,
    }


def test_table_of_runs(tmp_path):
    """Rows with a directory are read from there; others have means over seeds alone."""
    write_six(tmp_path)
    rows = [row(f"{x}-{seed}", x, seed) for x in ("fft", "lora", "molf") for seed in (1, 2)]
    table = write_table(tmp_path / "results.csv", rows)
    (found,), notices = summary_of([table])
    assert notices == []
    assert found.metric("accuracy").methods["molf"].value.value == 15 / 16
    write_table(table, [*rows, row("gone", "molf-e", 1, **{"after/accuracy": 0.75})])
    (found,), notices = summary_of([table])
    assert notices[0].startswith("1 of 7 runs are known from their row alone")
    assert found.metric("accuracy").methods["molf-e"].value.value == 0.75
    # Another run in the directory of a row.
    rows[0]["started"] = "2026-10-01T10:00:00+00:00"
    (found,), notices = summary_of([write_table(table, rows)])
    assert notices[0].startswith("1 of 6 runs are known from their row alone")


def test_rows_of_other_data(tmp_path):
    rows = [row("a", "fft", 1, data_hash="aa"), row("b", "lora", 1, data_hash="bb")]
    runs, _ = read_compared([write_table(tmp_path / "results.csv", rows)])
    with pytest.raises(InputError, match="hash of the data is aa in the first and bb in the"):
        cells_of(runs)


def test_wrong_tables(tmp_path):
    table = tmp_path / "results.csv"
    table.write_text("name,score\na,1\n")
    assert f"{table} is no table of molf's runs: its first line" in refused([table])
    table.write_text("")
    assert "is no table of molf's runs" in refused([table])
    one = row("a", "fft", 1)
    write_table(table, [one])
    assert "at least 2 runs; given: 1" in refused([table])
    assert "is given with 1 more" in refused([table, tmp_path])
    write_table(table, [one, {**one, "run": "b", "seed": "x"}])
    assert "run b has seed 'x', no number" in refused([table])
    table.write_bytes(b"\xff\xfe\x00")
    assert "is no table of molf's runs" in refused([table])


def test_predictions_may_be_missing(tmp_path):
    paths = write_six(tmp_path)
    (paths[0] / "predictions.jsonl").write_text("{")
    (found,), notices = summary_of(paths)
    assert "predictions.jsonl is missing or cannot be read" in notices[0]
    assert found.metric("accuracy").methods["fft"].value.units == "seeds"
    assert found.metric("accuracy").methods["molf"].value.units == "questions and seeds"


def test_pareto(tmp_path):
    summaries, _ = summary_of(write_six(tmp_path))
    assert check_pareto(None, summaries) == ("forgetting", "accuracy")
    assert check_pareto("training_seconds, accuracy", summaries) == ("training_seconds", "accuracy")
    figure = pareto_figure(summaries[0], ("forgetting", "accuracy"))
    assert [figure.points[number].name for number in figure.front] == ["lora", "molf"]
    assert figure.text.startswith("Not beaten in both forgetting and accuracy: lora, molf.")
    assert figure.table.rows[2][0] == "molf"
    memory = pareto_figure(summaries[0], ("peak_memory_bytes", "accuracy"))
    assert memory.points[0].x.value == pytest.approx(101.5)  # MiB
    for given, text in (
        ("accuracy", "Give two different metrics"),
        ("accuracy,accuracy", "Give two different metrics"),
        ("accuracy,", "Give two different metrics"),
        ("acuracy,forgetting", "Did you mean accuracy?"),
    ):
        with pytest.raises(InputError, match=text.replace("?", r"\?")):
            check_pareto(given, summaries)
