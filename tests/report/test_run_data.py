"""A run as data: what its files hold, and a notice for each that is missing or damaged."""

import json

import numpy as np
import pytest
import yaml

from molf.disk.locks import Lock
from molf.errors import InputError
from molf.job.record.routing_log import iter_steps, routing_parts
from molf.report.build import read_runs
from molf.report.routing_data import FACTORS, MOST_ROWS
from molf.report.run_data import read_run_data
from run_files import EXPERTS, LAYERS, SHAPES, scores, write_evaluation, write_routing, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def decisions(run):
    """Winner and scores by step (from 1) and layer, without those at rate 0."""
    found = {}
    for step in iter_steps(run):
        for layer, one in step["selections"].items():
            if any(one["scores"].values()):
                found[step["step"] + 1, layer] = (one["winners"][0], one["scores"])
    return found


@pytest.mark.parametrize("most_bins", [400, 7])
def test_bins_hold_every_decision(run, most_bins):
    data = read_run_data(run, most_bins=most_bins).routing
    known = decisions(run)
    assert len(data.first) <= most_bins
    assert (data.first[0], data.last[-1]) == (1, 60)
    assert data.rows == LAYERS
    for column, (first, last) in enumerate(zip(data.first, data.last, strict=True)):
        for row, layer in enumerate(LAYERS):
            inside = [known[key] for s in range(first, last + 1) if (key := (s, layer)) in known]
            assert data.decisions[row, column] == len(inside)
            for number, expert in enumerate(EXPERTS):
                won = sum(winner == expert for winner, _ in inside)
                assert data.wins[number, row, column] == won
            margins = [(s["full"] - s["lora0_r4"]) / sum(s.values()) for _, s in inside]
            expected = np.mean(margins) if margins else np.nan
            assert data.margin[row, column] == pytest.approx(expected, nan_ok=True)
    flips = data.flips.sum(axis=1)
    assert [int(one) for one in flips] == [0] * 8 + [5]
    assert data.routed.layers[-1].evidence.last_change == 51


def test_winners_at_other_rates(run):
    data = read_run_data(run).routing
    known = decisions(run)
    assert FACTORS[24] == 1
    for number, factor in enumerate(FACTORS):
        for row, layer in enumerate(LAYERS):
            own = [s for (_, name), (_, s) in known.items() if name == layer]
            share = np.mean([s["full"] >= factor * s["lora0_r4"] for s in own])
            assert data.full_at[row, number] == pytest.approx(share)
    shares = [layer.evidence.share("full") for layer in data.routed.layers]
    assert data.full_at[:, 24].tolist() == pytest.approx(shares)


@pytest.mark.parametrize("options", [{"score": "gsnr"}, {"top_k": 2}, {"score": "random"}])
def test_other_scores_have_no_winners_at_other_rates(tmp_path, options):
    data = read_run_data(write_run(tmp_path / "run", **options)).routing
    assert data.full_at is None
    assert data.margin is not None


def test_prediction_by_shape(run):
    """Formula 2: full leads where the ratio of rates is below sqrt(3) (in + out) / (s out)."""
    routed = read_run_data(run).routing.routed
    for layer in routed.layers:
        rows, columns = SHAPES[layer.kind]
        tips_at = 3**0.5 * (rows + columns) / (8 / 4**0.5 * rows)
        assert layer.tips_at == pytest.approx(tips_at)
        assert layer.by_shape.train == ("full" if routed.rate_ratio < tips_at else "lora")


def test_many_layers_share_rows(tmp_path):
    run = write_run(tmp_path / "run", method="lora")
    layers = tuple(f"model.layers.{i}.q_proj" for i in range(2 * MOST_ROWS + 5))
    write_routing(run, 3, scores, layers, 10**6)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"method": "molf"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    data = read_run_data(run).routing
    assert len(data.rows) == 135
    assert data.rows[0] == "model.layers.0.q_proj and 2 more"
    assert data.decisions[:, 1:].min() == 3
    assert data.decisions.sum() == 2 * len(layers)
    assert len(data.routed.layers) == len(layers)


def test_a_shared_row_has_layers_of_one_kind(tmp_path):
    """The map sorts rows by kind, so a row of q_proj and k_proj would be false."""
    run = write_run(tmp_path / "run", steps=0)
    kinds = ("q_proj", "k_proj", "up_proj")
    layers = tuple(f"model.layers.{i}.{kind}" for i in range(MOST_ROWS // 2) for kind in kinds)
    write_routing(run, 3, scores, layers, 10**6)
    data = read_run_data(run).routing
    assert data.rows[:4] == (
        "model.layers.0.q_proj and 1 more", "model.layers.0.k_proj and 1 more",
        "model.layers.0.up_proj and 1 more", "model.layers.2.q_proj and 1 more",
    )  # fmt: skip
    for row in range(len(data.rows)):
        members = [name for name, of in zip(layers, data.row_of, strict=True) if of == row]
        assert len({name.rpartition(".")[2] for name in members}) == 1


def test_metrics_and_samples(run):
    data = read_run_data(run)
    assert (data.status, data.notices, data.steps, data.last_step) == ("complete", [], 60, 60)
    (task,) = data.evaluated
    assert [(row.name, row.before.value, row.after.value) for row in task.metrics.rows] == [
        ("accuracy", 0.5, 0.7),
        ("forgetting_loss", 1.25, 1.5),
    ]
    (group,) = task.groups.values()
    assert [(one.title, one.rows[0].after.value) for one in group] == [
        ("Anatomy", 0.8),
        ("Bio", 0.6),
    ]
    assert (data.samples.total, data.samples.right, data.samples.wrong) == (10, 5, 5)
    sample = data.samples.shown[1]
    assert (sample.index, sample.right, sample.main) == (1, True, 4)
    assert [name for name, _ in sample.texts] == [
        *("prompt", "prediction", "expected", "answer", "log_probs")
    ]
    assert json.loads(sample.texts[-1][1]) == {"A": -0.1235, "B": -2.5}


def test_samples_are_bounded(run, monkeypatch):
    monkeypatch.setattr("molf.report.samples.MOST", 2)
    monkeypatch.setattr("molf.report.samples.MOST_CHARACTERS", 20)
    data = read_run_data(run)
    assert [(one.index, one.right) for one in data.samples.shown] == [
        *((0, False), (1, True), (2, False), (3, True))
    ]
    assert data.samples.total == 10
    assert len(data.samples.shown[0].texts[0][1]) < 45
    assert data.samples.shown[0].texts[0][1].endswith("more)")


def test_states(tmp_path):
    run = write_run(tmp_path / "run", complete=False)
    stopped = read_run_data(run)
    assert stopped.status == "stopped"
    assert "--resume continues it" in stopped.notices[-1]
    with Lock(run):
        running = read_run_data(run)
    assert running.status == "running"
    assert running.notices == ["The run has not ended: the page shows its files up to now."]
    (run / "error.log").write_text("Traceback ...\nValueError: no room\n")
    failed = read_run_data(run)
    assert (failed.status, failed.error) == ("failed", "ValueError: no room")


def test_other_version(run):
    environment = json.loads((run / "environment.json").read_text())
    environment["packages"]["molf"] = "9.9"
    (run / "environment.json").write_text(json.dumps(environment))
    (line,) = read_run_data(run).notices
    assert line.startswith("The run was made by molf 9.9, the page by molf ")


def test_truncated_part(run):
    parts = routing_parts(run)
    parts[1].write_bytes(parts[1].read_bytes()[:200])
    data = read_run_data(run)
    (line,) = data.notices
    assert line.startswith(f"Routing: {parts[1]} is not a readable Parquet file")
    assert line.endswith("Its steps are left out.")
    assert 0 < data.routing.decisions.sum() < 59 * len(LAYERS)
    parts[1].unlink()
    assert read_run_data(run).notices == ["Routing: 1 part of the log is missing."]
    for part in routing_parts(run):
        part.write_bytes(b"PAR1")
    data = read_run_data(run)
    assert data.routing is None
    assert len(data.notices) == len(parts) - 1


def test_damaged_files_are_notices(run):
    for name in ("environment.json", "eval.json"):
        (run / name).write_text('{"half')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    data = read_run_data(run)
    assert data.notices == [
        "environment.json is missing or cannot be read.",
        "metrics.jsonl: 1 line cannot be read.",
        "eval.json cannot be read.",
    ]
    assert len(data.log["loss"]) == 60
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing or cannot be read." in read_run_data(run).notices


@pytest.mark.parametrize(
    "record",
    [{}, {"task": "x"}, {"task": "x", "before": 1, "after": {}}, {"tasks": [1]}, {"tasks": 3}],
)
def test_records_of_other_forms(run, record):
    (run / "eval.json").write_text(json.dumps(record))
    data = read_run_data(run)
    assert data.notices == ["eval.json cannot be read."]
    assert data.evaluated == ()


def test_damaged_predictions(run):
    with (run / "predictions.jsonl").open("a") as file:
        file.write('[1]\n{"index": "x"}\n{"ind')
    data = read_run_data(run)
    assert data.notices == ["predictions.jsonl: 3 lines cannot be read."]
    assert data.samples.total == 10


def test_run_without_routing(tmp_path):
    data = read_run_data(write_run(tmp_path / "run", method="lora"))
    assert (data.routing, data.notices) == (None, [])
    lacking = write_run(tmp_path / "lacking")
    for part in routing_parts(lacking):
        part.unlink()
    (line,) = read_run_data(lacking).notices
    assert "has no routing" in line


def test_config_without_an_option_of_the_routing(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["ranks"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    data = read_run_data(run)
    assert data.routing is None
    assert data.notices == [
        "Routing is not shown: config.yaml lacks or misstates an option ('ranks')."
    ]


def test_evaluation_alone(tmp_path):
    write_evaluation(tmp_path)
    record = json.loads((tmp_path / "eval.json").read_text())
    one = {"task": "demo-med", "metrics": record["after"], "notes": {}}
    (tmp_path / "eval.json").write_text(json.dumps({"tasks": [one, {**one, "task": "other"}]}))
    data = read_run_data(tmp_path)
    assert (data.status, [task.task for task in data.evaluated]) == (
        "evaluation",
        ["demo-med", "other"],
    )
    assert data.evaluated[0].metrics.rows[0].before is None


def test_no_run(tmp_path, run):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty is not a run .*: it has no config\.yaml"):
        read_run_data(tmp_path / "empty")
    with pytest.raises(InputError, match=r"it holds .*run\. Give one run"):
        read_run_data(tmp_path)
    with pytest.raises(InputError, match="run is given twice"):
        read_runs([run, run.parent / "." / "run"])
    with pytest.raises(InputError, match="13 runs are too many for one page"):
        read_runs([run] * 13)


def test_equal_names_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name / "run", method="lora") for name in "ab"]
    assert [run.name for run in read_runs(runs)] == ["a/run", "b/run"]
