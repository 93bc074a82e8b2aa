"""`molf routing` and `molf eval` on what `molf train` left."""

import json
import shutil

import pytest

from molf.cli import main
from molf.job.record.routing_shares import routing_shares
from molf.job.settings.defaults import METHODS
from slow_cases import slow_after


def test_routing_jsonl(molf_run, capsys):
    assert main(["routing", str(molf_run.path), "--jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = [
        {
            "step": step,
            "selections": {
                layer: {"winners": list(decision.winners), "scores": decision.scores}
                for layer, decision in routing.items()
            },
        }
        for step, routing in enumerate(molf_run.routing)
    ]
    assert lines == expected


def test_routing_table(molf_run, capsys):
    assert main(["routing", str(molf_run.path), "--layers"]) == 0
    out = capsys.readouterr().out
    assert "3 steps, 14 layers" in out
    for name in ("q_proj", "model.layers.1.mlp.down_proj", "lora0_r4"):
        assert name in out
    assert "most frequent winner" not in out


def test_routing_map(molf_run, capsys):
    """A row per layer, a character per step; the first step is at rate 0."""
    assert main(["routing", str(molf_run.path)]) == 0
    out = capsys.readouterr().out
    legend, *rows = out[out.index("most frequent winner") :].splitlines()
    assert legend == ("most frequent winner: F full, 0 lora0_r4, . none; steps from left to right")
    for row, layer in zip(rows, molf_run.routing[0], strict=False):
        name, cells = row.split()
        assert layer.endswith(name)
        won = [step[layer].winners[0] for step in molf_run.routing[1:]]
        assert cells == "." + "".join("F" if one == "full" else "0" for one in won)
    assert "model.layers.1.mlp.down_proj" not in out


def test_routing_shares(molf_run):
    steps = molf_run.routing[1:]  # in the first, the warm-up's rate is 0: a tie, and no win
    decisions = [decision for step in steps for decision in step.values()]
    won = sum(decision.winners == ("full",) for decision in decisions)
    shares = routing_shares(molf_run.path)
    assert shares.total["full"] == pytest.approx(won / len(decisions))
    assert list(shares.by_layer) == list(molf_run.routing[0])
    assert list(shares.by_kind)[:2] == ["q_proj", "k_proj"]
    q_proj = [d.winners for step in steps for n, d in step.items() if n.endswith("q_proj")]
    assert shares.by_kind["q_proj"]["full"] == pytest.approx(q_proj.count(("full",)) / len(q_proj))


def test_routing_without_a_full_expert(run_of, capsys):
    run = run_of("molf-e")
    shares = routing_shares(run.path)
    assert set(shares.total) == {"lora0_r2", "lora1_r4"}
    assert sum(shares.total.values()) == pytest.approx(1)
    capsys.readouterr()
    assert main(["routing", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "lora1_r4" in out
    assert "full" not in out


def test_routing_of_a_run_without(lora_run, capsys):
    assert main(["routing", str(lora_run.path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no routing" in error


@pytest.mark.parametrize(
    "any_run", slow_after(4, reversed([*METHODS, "molf-dropout"])), indirect=True
)
def test_eval_of_the_saved_model_is_the_after(any_run, facts, tmp_path):
    arguments = ["eval", str(any_run.path / "model"), "--task", "fact", "--data", str(facts)]
    assert main([*arguments, "--output_dir", str(tmp_path / "e")]) == 0
    evaluation = json.loads((tmp_path / "e" / "eval.json").read_text())
    after = json.loads((any_run.path / "eval.json").read_text())["after"]
    assert evaluation["task"] == "fact"
    assert evaluation["metrics"] == after


def test_eval_of_the_base_is_the_before(any_run, base, facts, tmp_path):
    arguments = ["eval", str(base), "--task", "fact", "--data", str(facts)]
    assert main([*arguments, "--output_dir", str(tmp_path / "e")]) == 0
    evaluation = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert evaluation["metrics"] == json.loads((any_run.path / "eval.json").read_text())["before"]


def test_eval_of_saved_predictions_needs_no_model(molf_run, facts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("molf.job.model.loading.load_model", None)
    predictions = molf_run.path / "predictions.jsonl"
    arguments = ["eval", "--task", "fact", "--data", str(facts), "--predictions", str(predictions)]
    assert main([*arguments, "--output_dir", str(tmp_path / "e")]) == 0
    evaluation = json.loads((tmp_path / "e" / "eval.json").read_text())
    after = json.loads((molf_run.path / "eval.json").read_text())["after"]
    assert evaluation["metrics"] == {name: after[name] for name in ("acc_new", "acc_true")}
    assert "not measured: es" in capsys.readouterr().out


def test_eval_writes_only_where_it_may(molf_run, facts, capsys):
    predictions = molf_run.path / "predictions.jsonl"
    arguments = ["eval", "--task", "fact", "--data", str(facts), "--predictions", str(predictions)]
    assert main([*arguments, "--output_dir", str(molf_run.path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["r[/x]", "r[bold]"])
def test_names_are_no_markup(molf_run, tmp_path, capsys, name):
    run = tmp_path / name
    shutil.copytree(molf_run.path, run)
    assert main(["routing", str(run)]) == 0
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert f"{run}: 3 steps".replace(" ", "") in shown


def test_routing_that_cannot_be_read(molf_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(molf_run.path, run)
    part = run / "routing" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    for extra in ([], ["--jsonl"]):
        assert main(["routing", str(run), *extra]) == 2
        error = capsys.readouterr().err
        assert f"{part} is not a readable Parquet file" in error
        assert error.count("\n") == 1
