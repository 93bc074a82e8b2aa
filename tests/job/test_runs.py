"""What a run leaves behind, for each method."""

import csv
import json

import pytest
import torch
import yaml

from molf.cli import main
from molf.job.record.contents import hash_of_data
from molf.job.record.routing_log import read_routing
from molf.job.settings.defaults import ADAPTERS, METHODS
from molf.measure.meanings import METRICS_VERSION
from recorded import logits_of
from slow_cases import slow_after

BASE_METRICS = {"es", "em", "ps", "pm", "ns", "nm", "s", "acc_new", "acc_true", "forgetting_loss"}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_run_directory_is_complete(any_run):
    names = {path.name for path in any_run.path.iterdir()}
    expected = {
        *("config.yaml", "environment.json", "metrics.jsonl", "model", "eval.json"),
        *("examples.jsonl", "predictions.jsonl", "report.html", "spectra.json"),
    }
    if any_run.path.name in ("molf", "molf-e", "molf-dropout"):
        expected.add("routing")
    if any_run.path.name in (*ADAPTERS, "molf-e"):
        expected.add("adapter")
    if any_run.path.name == "hybrid":
        expected.add("assignment.yaml")
    assert names == expected
    assert read_json(any_run.path / "environment.json")["packages"]["torch"] == torch.__version__


def test_model_directory_holds_what_transformers_needs(any_run):
    names = {path.name for path in (any_run.path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= names
    card = (any_run.path / "model" / "README.md").read_text()
    after = read_json(any_run.path / "eval.json")["after"]
    assert f"{after['es']['value']:.3f}" in card
    assert "learning_rate: 0.01" in card


def test_base_configuration_is_kept(any_run, base):
    """The trainer turns caching off and sets padding tokens; none of that is saved."""
    saved = read_json(any_run.path / "model" / "config.json")
    assert saved == read_json(base / "config.json")


def test_eval_json(any_run):
    evaluation = read_json(any_run.path / "eval.json")
    assert evaluation["task"] == "fact"
    for when in ("before", "after"):
        expected = BASE_METRICS | ({"kl_neutral", "kl_task"} if when == "after" else set())
        assert set(evaluation[when]) == expected
        for metric in evaluation[when].values():
            assert set(metric) == {"value", "low", "high", "count"}


def test_training_teaches(any_run):
    losses = [entry["loss"] for entry in read_metrics(any_run.path)]
    assert losses[-1] < losses[0]
    evaluation = read_json(any_run.path / "eval.json")
    assert evaluation["after"]["em"]["value"] > evaluation["before"]["em"]["value"]


def test_metrics_of_every_step(molf_run):
    entries = read_metrics(molf_run.path)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    for entry in entries:
        assert {"loss", "grad_norm", "tokens_per_second", "epoch"} <= set(entry)
        # At rate 0, the first step of a warm-up, nobody wins.
        won = [share for name, share in entry.items() if name.startswith("won/")]
        assert sum(won) == pytest.approx(1 if entry["learning_rate"] else 0)
        assert entry["lora_learning_rate"] == pytest.approx(3 * entry["learning_rate"])


def test_one_rate_where_nothing_dense_is_trained(run_of):
    run = run_of("molf-e")
    rates = [(e["learning_rate"], e["lora_learning_rate"]) for e in read_metrics(run.path)]
    assert max(rates) == (3e-2, 3e-2)
    with (run.path.parent / "results.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["run"] == run.path.name)
    assert (row["learning_rate"], row["lora_learning_rate"]) == ("", "0.03")
    assert (row["ranks"], row["score"]) == ("2,4", "epd")
    assert float(row["won/lora0_r2"]) + float(row["won/lora1_r4"]) == pytest.approx(1)


def test_routing_equals_the_optimizers_decisions(molf_run):
    rows = read_routing(molf_run.path).to_pylist()
    expected = [
        {
            "step": step,
            "layer": layer,
            "expert": expert,
            "score": score,
            "winner": expert in decision.winners,
        }
        for step, routing in enumerate(molf_run.routing)
        for layer, decision in routing.items()
        for expert, score in decision.scores.items()
    ]
    assert len(molf_run.routing) == 3
    assert rows == expected
    winners = {row["expert"] for row in rows if row["winner"]}
    assert winners == {"full", "lora0_r4"}  # else the test would show little


def test_results_row_beside_the_runs(any_run):
    with (any_run.path.parent / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == any_run.path.name]
    assert len(rows) == 1
    after = read_json(any_run.path / "eval.json")["after"]
    assert float(rows[0]["after/es"]) == after["es"]["value"]
    assert rows[0]["method"] == any_run.path.name.replace("-dropout", "")


def test_recorded_costs_and_hashes(molf_run, facts):
    """The table and the run have the same; `molf compare` reads either."""
    with (molf_run.path.parent / "results.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["run"] == molf_run.path.name)
    run = yaml.safe_load((molf_run.path / "config.yaml").read_text())["run"]
    assert float(row["training_seconds"]) == run["training"]["seconds"] > 0
    assert int(row["peak_memory_bytes"]) == run["training"]["peak_memory_bytes"] > 0
    assert run["training"]["peak_memory_of"] == "process"
    assert row["base_hash"] == run["model"]["contents"]
    assert row["base_hash"].startswith("sha256:")
    assert row["data_hash"] == hash_of_data(run["data"]["files"], str(facts))
    assert int(row["metrics_version"]) == METRICS_VERSION
    assert read_json(molf_run.path / "eval.json")["metrics_version"] == METRICS_VERSION


def test_config_is_a_recipe_that_gives_the_same_run(molf_run, workplace):
    again = workplace / "again"
    config = molf_run.path / "config.yaml"
    assert main(["train", "--config", str(config), "--output_dir", str(again)]) == 0
    assert read_json(again / "eval.json") == read_json(molf_run.path / "eval.json")
    assert read_routing(again).equals(read_routing(molf_run.path))


def test_config_records_the_data(molf_run, facts):
    config = yaml.safe_load((molf_run.path / "config.yaml").read_text())
    assert config["overwrite"] is False
    assert config["save_dtype"] == "float32"
    assert config["run"]["task"]["data"] == str(facts)
    assert config["run"]["task"]["prompt_version"] == 1
    assert config["run"]["data"]["left_out_too_long"] == 0
    assert config["run"]["model"]["adapted_layers"] == 14


def test_accumulated_batches_give_the_same_run(record, base, facts, workplace):
    """One batch of 6, or two of 3: same losses, norms and winners (loss is a mean over tokens)."""
    common = [
        *("train", "--task", "fact", "--model", str(base), "--data", str(facts)),
        *("--ranks", "4", "--learning_rate", "1e-3", "--max_steps", "4", "--logging_steps", "1"),
    ]
    runs = []
    for size, steps in ((6, 1), (3, 2)):
        batches = ["--per_device_train_batch_size", str(size)]
        batches += ["--gradient_accumulation_steps", str(steps)]
        runs.append(record([*common, *batches], workplace / f"accumulated-{steps}"))
    one, two = (read_metrics(run.path) for run in runs)
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    winners = [[{k: d.winners for k, d in step.items()} for step in run.routing] for run in runs]
    assert winners[0] == winners[1]


@pytest.mark.parametrize(
    "any_run", slow_after(4, reversed([*METHODS, "molf-dropout"])), indirect=True
)
def test_gradient_checkpointing_changes_nothing(record, any_run, workplace):
    path = workplace / f"checkpointing-{any_run.path.name}"
    run = record([*any_run.arguments, "--gradient_checkpointing"], path)
    torch.testing.assert_close(run.trained_logits, any_run.trained_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [*ADAPTERS, "molf-e", "molf-dropout"])
def test_merged_model_equals_the_adapter_model(run_of, method):
    run = run_of(method)
    difference = (run.trained_logits - run.adapter_logits).abs().max()
    assert difference < 1e-5
    assert (run.trained_logits - run.base_logits).abs().max() > 1e-3  # else it would show little


def test_saved_model_gives_the_trained_logits(any_run):
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(any_run.path / "model")
    assert torch.equal(logits_of(saved), any_run.trained_logits)


def test_checkpoints_only_if_asked(record, options, workplace):
    run = record(
        [*options, "--save_steps", "1", "--save_total_limit", "2"], workplace / "checkpoints"
    )
    found = sorted(path.name for path in (run.path / "checkpoints").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3"]


def test_a_warning_is_shown_once(base, facts, workplace, capsys):
    arguments = ["train", "--task", "fact", "--model", str(base), "--data", str(facts)]
    arguments += ["--max_steps", "2", "--ranks", "40", "--output_dir", str(workplace / "large")]
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("Rank 40 exceeds") == 1


def test_too_long_examples_are_counted_and_said(options, workplace, capsys):
    path = workplace / "long"
    assert main([*options, "--max_length", "17", "--output_dir", str(path)]) == 0
    config = yaml.safe_load((path / "config.yaml").read_text())
    left_out = config["run"]["data"]["left_out_too_long"]
    assert 0 < left_out < 12
    assert f" {left_out} longer than" in capsys.readouterr().err


def test_checkpoints_of_a_run_are_whole_so_it_gives_no_warning_of_them(options, tmp_path, capsys):
    """PEFT alone would save the adapter; the trainer of a run saves all trained weights."""
    path = tmp_path / "out"
    given = ["--method", "molf", "--lora_dropout", "0.05", "--output_dir", str(path)]
    assert main([*options, *given]) == 0
    assert "saves the adapter only" not in capsys.readouterr().err
